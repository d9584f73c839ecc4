"""A causal language model continues a prompt with the label of a text, or with words for it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch

from finespun import models
from finespun.models import Loaded
from finespun.models.loaded import slices_logits
from finespun.tasks.prompts import AnswerTokens, Asker, answer_words, collate, tokenize_answers
from finespun.tasks.scoring import continue_prompts, groups, measure, score
from finespun.tasks.tables import LabelledTexts
from finespun.tasks.task import IGNORED, Answer, Batch, Limits, register
from finespun.tasks.texts import TextTask

SHOWN = 3
MOST_TOKENS = 24


@register
@dataclass(frozen=True, kw_only=True)
class AnswerPrompt(TextTask[AnswerTokens]):
    """The label after a prompt.

    `prompt` holds {text}, and {pair} for pairs; with `chat` it is a user's turn in the model's own
    chat template. `answers` gives the words for each label, None: the label itself. `classes` are
    all labels; None: those of the rows.
    """

    prompt: str = "{text}\n"
    answers: dict[str, str] | None = None
    chat: bool = False
    classes: tuple[str, ...] | None = None

    kind = "answer"
    takes = "causal"
    best = "exact_match"
    metrics = ("exact_match", "accuracy")
    falls = "loss"
    packs = True
    labels = "classes"
    free = True

    @property
    def known(self) -> tuple[str, ...] | None:
        return self.classes

    def settled(self, examples: LabelledTexts) -> Self:
        return dataclasses.replace(self, classes=examples.classes)

    def load(self, model: str, seed: int) -> Loaded:
        return models.load_causal(model)

    def encode(self, loaded: Loaded, examples: LabelledTexts, limits: Limits) -> AnswerTokens:
        asker = Asker(loaded.tokenizer, self.prompt, self.chat)
        words = answer_words(examples.classes or (), self.answers)
        return tokenize_answers(asker, examples, words, limits, slices_logits(loaded.model))

    def collate(self, encoded: AnswerTokens, indices: Sequence[int]) -> Batch:
        return collate(encoded, indices)

    def weight(self, batch: Batch) -> int:
        """Labelled tokens; the first column predicts and is not predicted."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def count(self, batch: Batch) -> int:
        """Rows, or in a packed batch what begins at position 0."""
        if batch["attention_mask"].dim() == 4:
            return int((batch["position_ids"] == 0).sum())
        return len(batch["labels"])

    def groups(self, encoded: AnswerTokens) -> list[list[int]]:
        return list(groups(encoded))

    def measure(self, loaded: Loaded, encoded: AnswerTokens) -> dict[str, float]:
        """exact_match and loss, and accuracy where there are few enough answers to weigh."""
        return measure(loaded.model, encoded)

    def answer(self, loaded: Loaded, inputs: LabelledTexts, limits: Limits) -> list[Answer]:
        """The likeliest class and each one's share of probability among the answers; or the model's
        own words where there are too many answers to weigh."""
        encoded, classes = self.encode(loaded, inputs, limits), self.classes or ()
        if len(encoded.candidates[0]) < len(classes):
            prompts = [encoded.prompt_ids(i) for i in range(len(encoded))]
            said = continue_prompts(loaded.model, loaded.tokenizer, prompts, MOST_TOKENS)
            return [Answer(text, label=words) for text, words in zip(inputs.texts, said)]
        found = []
        for text, gained in zip(inputs.texts, score(loaded.model, encoded).words):
            shares = torch.tensor(gained, dtype=torch.float64).softmax(0).tolist()
            best = max(range(len(shares)), key=shares.__getitem__)
            found.append(
                Answer(text, label=classes[best], probabilities=dict(zip(classes, shares)))
            )
        return found

    def show(
        self,
        loaded: Loaded,
        encoded: AnswerTokens,
        disabled: Callable[[], AbstractContextManager[Any]],
    ) -> Iterator[str]:
        """For the first prompts: what the base says and what the adapted model says."""
        prompts = [encoded.prompt_ids(i) for i in range(min(SHOWN, len(encoded)))]
        model, tokenizer = loaded.model, loaded.tokenizer
        with disabled():
            before = continue_prompts(model, tokenizer, prompts, MOST_TOKENS)
        after = continue_prompts(model, tokenizer, prompts, MOST_TOKENS)
        for ids, old, new in zip(prompts, before, after):
            prompt = tokenizer.decode(ids, skip_special_tokens=True)
            yield f"{prompt!r}: before {old!r}, after {new!r}"
