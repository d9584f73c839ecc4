"""Texts as tokens, and the batches that a padding tokenizer makes of them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from finespun.errors import InputError
from finespun.tasks.tables import LabelledTexts
from finespun.tasks.task import Batch, Encoded, Limits


@dataclass(frozen=True)
class Tokens(Encoded):
    """Tokenised rows, not padded, with their labels (rows,) and the tokenizer that pads them."""

    rows: tuple[dict[str, list[int]], ...]
    labels: Tensor
    tokenizer: Any

    @cached_property
    def lengths(self) -> list[int]:
        """The number of tokens of every row, after cutting."""
        return [len(row["input_ids"]) for row in self.rows]

    @property
    def content(self) -> Any:
        """Tokens and labels."""
        return [[row["input_ids"] for row in self.rows], self.labels.tolist()]

    def take(self, indices: Sequence[int]) -> Self:
        """The rows `indices` alone."""
        rows, labels = tuple(self.rows[i] for i in indices), self.labels[list(indices)]
        return dataclasses.replace(self, rows=rows, labels=labels)


def tokenize(tokenizer: Any, examples: LabelledTexts, limits: Limits) -> Tokens:
    """Tokenise all rows; pairs are joined by the tokenizer's own separator.

    Raises InputError if `max_length` leaves no room for a token of text.
    """
    pair, most = examples.pairs is not None, limits.max_length
    least = tokenizer.num_special_tokens_to_add(pair=pair) + (2 if pair else 1)
    if most < least:
        raise InputError(f"max_length = {most} leaves no room for text; at least {least}")
    others = [list(examples.pairs)] if examples.pairs is not None else []
    whole = tokenizer(list(examples.texts), *others, verbose=False)
    cut = sum(len(ids) > most for ids in whole["input_ids"])
    if cut:
        whole = tokenizer(list(examples.texts), *others, truncation=True, max_length=most)
    names = [name for name in whole if name != "special_tokens_mask"]
    rows = tuple({name: whole[name][i] for name in names} for i in range(len(whole["input_ids"])))
    return Tokens(limits, cut, rows, examples.label_tensor(), tokenizer)


def pad(tokens: Tokens, indices: Sequence[int]) -> Batch:
    """The rows `indices` as tensors (rows, longest of them), labels under "labels"."""
    padded = tokens.tokenizer.pad([tokens.rows[i] for i in indices], return_tensors="pt")
    return {**padded, "labels": tokens.labels[torch.as_tensor(indices, dtype=torch.long)]}
