"""How well a language model answers: the likeliest of the possible answers, the greedy answer, and
the loss, all from one forward pass."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from finespun.hosts.modes import evaluating
from finespun.tasks.prompts import PADDING, AnswerTokens, segment_mask

BATCH_TOKENS = 1024


class Scores(NamedTuple):
    """For every row: log p of each candidate's words (the end left out), whether the greedy answer
    is the right one to the end, and the summed loss of the right one with its number of tokens."""

    words: list[list[float]]
    exact: list[bool]
    losses: list[float]
    tokens: list[int]


class Tree(NamedTuple):
    """Prompts as trunks with all candidates as branches, padded on the left: (rows, tokens)."""

    input_ids: Tensor
    segments: Tensor
    positions: Tensor


def measure(model: nn.Module, tokens: AnswerTokens) -> dict[str, float]:
    """accuracy (the likeliest candidate is the right one; only where there are two or more),
    exact_match (greedy decoding gives the right answer and ends) and loss (mean over answer tokens,
    the end included)."""
    scores = score(model, tokens)
    found = {}
    if all(len(row) > 1 for row in scores.words):
        hits = [max(range(len(w)), key=w.__getitem__) for w in scores.words]
        found["accuracy"] = sum(h == r for h, r in zip(hits, tokens.right)) / len(hits)
    found["exact_match"] = sum(scores.exact) / len(scores.exact)
    found["loss"] = sum(scores.losses) / sum(scores.tokens)
    return found


@torch.no_grad()
def score(model: nn.Module, tokens: AnswerTokens) -> Scores:
    """`Scores` of all rows, in eval mode."""
    device = next(model.parameters()).device
    words: list[list[float]] = [[] for _ in range(len(tokens))]
    exact, losses, counts = [False] * len(tokens), [0.0] * len(tokens), [0] * len(tokens)
    with evaluating(model):
        for rows in groups(tokens):
            tree = _tree(tokens, rows)
            inputs: dict[str, Tensor] = {
                "input_ids": tree.input_ids.to(device),
                "attention_mask": segment_mask(tree.segments).to(device, model_dtype(model)),
                "position_ids": tree.positions.to(device),
            }
            width = tree.input_ids.shape[1]
            keep = max(sum(map(len, _fed(tokens, i))) for i in rows) + 1
            if tokens.slices:
                inputs["logits_to_keep"] = torch.arange(width - keep, width, device=device)
            logits = model(**inputs, use_cache=False).logits[:, -keep:].float()
            log_p = functional.log_softmax(logits, dim=-1).cpu()
            for k, i in enumerate(rows):
                for j, (candidate, at) in enumerate(_branches(tokens, i, keep)):
                    said = candidate[: len(at)]
                    gained = log_p[k, at, said]
                    words[i].append(float(gained[: len(candidate) - 1].sum()))
                    if j == tokens.right[i]:
                        exact[i] = log_p[k, at].argmax(-1).tolist() == said
                        losses[i], counts[i] = -float(gained.sum()), len(said)
    return Scores(words, exact, losses, counts)


def groups(tokens: AnswerTokens) -> Iterator[list[int]]:
    """Row numbers, longest first, in groups of about `BATCH_TOKENS` tokens."""
    sizes = [tokens.begins[i] + sum(map(len, _fed(tokens, i))) for i in range(len(tokens))]
    order = sorted(range(len(tokens)), key=sizes.__getitem__, reverse=True)
    while order:
        count = max(1, BATCH_TOKENS // sizes[order[0]])
        yield order[:count]
        order = order[count:]


def _tree(tokens: AnswerTokens, rows: Sequence[int]) -> Tree:
    parts: list[tuple[list[int], list[int], list[int]]] = []
    for i in rows:
        ids = tokens.prompt_ids(i)
        whole, segments, positions = list(ids), [0] * len(ids), list(range(len(ids)))
        for j, branch in enumerate(_fed(tokens, i), start=1):
            whole += branch
            segments += [j] * len(branch)
            positions += range(len(ids), len(ids) + len(branch))
        parts.append((whole, segments, positions))
    length = max(len(whole) for whole, _, _ in parts)
    filled = [
        [[empty] * (length - len(values)) + values for values in column]
        for column, empty in zip(zip(*parts), (tokens.tokenizer.pad_token_id, PADDING, 0))
    ]
    return Tree(*(torch.tensor(values) for values in filled))


def _fed(tokens: AnswerTokens, i: int) -> list[list[int]]:
    """What the model must read of each candidate: all but what is only predicted, which is the end
    of the right one, and the last word and the end of the others."""
    right = tokens.right[i]
    return [c[:-1] if j == right else c[:-2] for j, c in enumerate(tokens.candidates[i])]


def _branches(tokens: AnswerTokens, i: int, keep: int) -> Iterator[tuple[list[int], list[int]]]:
    """Each candidate, and which of the last `keep` columns predict its tokens: the first is
    predicted by the prompt's last token, the others by the token before them."""
    fed = _fed(tokens, i)
    start = keep - sum(map(len, fed))
    trunk = start - 1
    for candidate, branch in zip(tokens.candidates[i], fed):
        yield candidate, [trunk, *range(start, start + len(branch))]
        start += len(branch)


@torch.no_grad()
def continue_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int
) -> list[str]:
    """What the model says after each prompt (token numbers), greedily, at most `most` tokens."""
    said = []
    device = next(model.parameters()).device
    with evaluating(model):
        for ids in prompts:
            given = torch.tensor([list(ids)], device=device)
            found = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            text: str = tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)
            said.append(text.strip())
    return said


def model_dtype(model: nn.Module) -> torch.dtype:
    """The precision that the model computes in."""
    found = getattr(model, "dtype", None)
    return found if isinstance(found, torch.dtype) else next(model.parameters()).dtype
