"""From texts to batches: tokens, batches of similar length, an order that can be taken up again."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from finespun.errors import InputError, StateError
from finespun.tasks.tables import Examples

Batch = dict[str, Tensor]
IGNORED = -100  # the label of a token that no loss is taken of


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows, not padded; `cut` counts the rows that were longer than `max_length`."""

    rows: tuple[dict[str, list[int]], ...]
    labels: Tensor
    cut: int
    max_length: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of every row, after cutting."""
        return [len(row["input_ids"]) for row in self.rows]

    def take(self, indices: Sequence[int]) -> Self:
        """The rows `indices` alone."""
        rows, labels = tuple(self.rows[i] for i in indices), self.labels[list(indices)]
        return dataclasses.replace(self, rows=rows, labels=labels)

    def collate(self, tokenizer: Any, indices: Sequence[int]) -> Batch:
        """The rows `indices` as tensors (rows, longest of them), labels under "labels"."""
        padded = tokenizer.pad([self.rows[i] for i in indices], return_tensors="pt")
        return {**padded, "labels": self.labels[torch.as_tensor(indices, dtype=torch.long)]}

    @property
    def report(self) -> str:
        """One line that says how many rows were cut."""
        share = 100 * self.cut / max(len(self), 1)
        return f"{self.cut} of {len(self)} rows ({share:.1f} %) cut at {self.max_length} tokens"


@dataclass(frozen=True)
class Position:
    """Where a `Batches` stands: the epoch, from 0, and the number of its batches already given."""

    epoch: int = 0
    batch: int = 0


def tokenize(tokenizer: Any, examples: Examples, max_length: int) -> Tokens:
    """Tokenise all rows; pairs are joined by the tokenizer's own separator.

    Raises InputError if `max_length` leaves no room for a token of text.
    """
    pair = examples.pairs is not None
    least = tokenizer.num_special_tokens_to_add(pair=pair) + (2 if pair else 1)
    if max_length < least:
        raise InputError(f"max_length = {max_length} leaves no room for text; at least {least}")
    others = [list(examples.pairs)] if examples.pairs is not None else []
    whole = tokenizer(list(examples.texts), *others, verbose=False)
    cut = sum(len(ids) > max_length for ids in whole["input_ids"])
    if cut:
        whole = tokenizer(list(examples.texts), *others, truncation=True, max_length=max_length)
    names = [name for name in whole if name != "special_tokens_mask"]
    rows = tuple({name: whole[name][i] for name in names} for i in range(len(whole["input_ids"])))
    return Tokens(rows, examples.label_tensor(), cut, max_length)


def pad(tokenizer: Any, tokens: Tokens, indices: Sequence[int]) -> Batch:
    """The rows `indices` as the tensors that the model takes, labels among them."""
    return tokens.collate(tokenizer, indices)


def weight_of(batch: Batch) -> int:
    """How much a batch's mean loss counts beside others': its rows, or its labelled tokens."""
    labels = batch["labels"]
    return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())


def rows_of(batch: Batch) -> int:
    """Examples in a batch; in a packed one they begin at position 0."""
    positions = batch.get("position_ids")
    packed = positions is not None and batch["attention_mask"].dim() == 4
    return int((positions == 0).sum()) if packed and positions is not None else len(batch["labels"])


class Batches:
    """Batches of rows of similar length, in an order drawn anew for every epoch.

    Rows are shuffled, cut into pools of `POOL` batches, sorted by length inside a pool, cut into
    batches, and the batches shuffled. The order of an epoch depends on (seed, epoch) alone, so a
    `Position` is all that a checkpoint needs: `restore` goes on with the very next batch.
    """

    POOL = 16

    def __init__(self, tokenizer: Any, tokens: Tokens, batch_size: int, *, seed: int = 0) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size = {batch_size}; at least 1")
        if len(tokens) == 0:
            raise InputError("no rows to make batches of")
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self._position = Position()

    def __len__(self) -> int:
        """Batches in one epoch."""
        return -(-len(self.tokens) // self.batch_size)

    @property
    def position(self) -> Position:
        """The epoch and the number of its batches already given."""
        return self._position

    def restore(self, position: Position) -> None:
        """Go on from `position`. Raises StateError if this data has no such place."""
        if position.epoch < 0 or not 0 <= position.batch <= len(self):
            raise StateError(
                f"epoch {position.epoch}, batch {position.batch} is not a place in this data, "
                f"which has {len(self)} batches an epoch"
            )
        self._position = position

    def order(self, epoch: int) -> list[list[int]]:
        """The row numbers of every batch of an epoch; each row is in exactly one of them."""
        draw = random.Random(f"{self.seed}/{epoch}")
        rows = list(range(len(self.tokens)))
        draw.shuffle(rows)
        lengths = self.tokens.lengths
        size, pool = self.batch_size, self.batch_size * self.POOL
        batches = []
        for start in range(0, len(rows), pool):
            group = sorted(rows[start : start + pool], key=lengths.__getitem__)
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        draw.shuffle(batches)
        return batches

    def epoch(self) -> Iterator[Batch]:
        """The batches that are left of the present epoch; at its end the next epoch stands ready.

        `position` already counts a batch while it is being used.
        """
        number = self._position.epoch
        order = self.order(number)
        for index in range(self._position.batch, len(order)):
            self._position = Position(number, index + 1)
            yield pad(self.tokenizer, self.tokens, order[index])
        self._position = Position(number + 1, 0)


def in_order(tokenizer: Any, tokens: Tokens, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """Every row once for evaluation, longest first: (row numbers, batch) pairs."""
    for rows in longest_first(tokens, batch_size):
        yield rows, pad(tokenizer, tokens, rows)


def longest_first(tokens: Tokens, batch_size: int) -> list[list[int]]:
    """The row numbers of the batches of `in_order`."""
    lengths = tokens.lengths
    rows = sorted(range(len(tokens)), key=lengths.__getitem__, reverse=True)
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
