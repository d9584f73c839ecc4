"""Labelled texts as a job for a causal language model: it continues a prompt with the answer."""

from collections.abc import Iterator

import torch

from finespun.adapter import Adapter
from finespun.errors import InputError
from finespun.models.causal import slices_logits
from finespun.models.zoo import TextModel
from finespun.recipes.recipe import Recipe
from finespun.tasks.lm_measure import continue_prompts, score
from finespun.tasks.lm_text import AnswerTokens, Asker, answer_words, tokenize_answers
from finespun.tasks.tables import Examples
from finespun.tasks.text import Tokens

SHOWN = 3
MOST_TOKENS = 24


def asker_of(recipe: Recipe, text: TextModel) -> Asker:
    """What makes the recipe's prompts. Raises InputError where it has none."""
    if recipe.data.prompt is None:
        raise InputError("this recipe has no data.prompt")
    return Asker(text.tokenizer, recipe.data.prompt, recipe.data.chat)


def answer_rows(recipe: Recipe, text: TextModel, examples: Examples) -> AnswerTokens:
    """The recipe's prompts with their answers, as tokens."""
    return tokenize_answers(
        asker_of(recipe, text),
        examples,
        answer_words(examples.classes, recipe.data.answers),
        recipe.training.max_length,
        recipe.training.pack,
        slices_logits(text.model),
    )


def answer(
    recipe: Recipe, text: TextModel, examples: Examples
) -> list[tuple[str, dict[str, float]]]:
    """For every text the likeliest class and each one's share of probability among the answers; or
    the model's own words and no shares where there are too many answers to weigh."""
    rows = answer_rows(recipe, text, examples)
    classes = examples.classes or ()
    if len(rows.candidates[0]) < len(classes):
        prompts = [rows.prompt_ids(i) for i in range(len(rows))]
        said = continue_prompts(text.model, text.tokenizer, prompts, MOST_TOKENS)
        return [(words, {}) for words in said]
    found = []
    for gained in score(text.model, rows, text.tokenizer.pad_token_id).words:
        shares = torch.tensor(gained, dtype=torch.float64).softmax(0).tolist()
        best = max(range(len(shares)), key=shares.__getitem__)
        found.append((classes[best], dict(zip(classes, shares))))
    return found


def samples(text: TextModel, adapter: Adapter, rows: Tokens) -> Iterator[str]:
    """For the first held-out prompts: what the base says and what the adapted model says."""
    if not isinstance(rows, AnswerTokens):
        return
    prompts = [rows.prompt_ids(i) for i in range(min(SHOWN, len(rows)))]
    with adapter.disabled():
        before = continue_prompts(text.model, text.tokenizer, prompts, MOST_TOKENS)
    after = continue_prompts(text.model, text.tokenizer, prompts, MOST_TOKENS)
    for ids, old, new in zip(prompts, before, after):
        prompt = text.tokenizer.decode(ids, skip_special_tokens=True)
        yield f"{prompt!r}: before {old!r}, after {new!r}"
