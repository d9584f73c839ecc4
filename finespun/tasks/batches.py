"""Batches of examples of similar size, in an order that can be taken up again."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finespun.errors import InputError, StateError
from finespun.tasks.task import Batch, Encoded, Task


@dataclass(frozen=True)
class Position:
    """Where a `Batches` stands: the epoch, from 0, and the number of its batches already given."""

    epoch: int = 0
    batch: int = 0


class Batches:
    """Batches of rows of similar length, in an order drawn anew for every epoch.

    Rows are shuffled, cut into pools of `POOL` batches, sorted by length inside a pool, cut into
    batches, and the batches shuffled. The order of an epoch depends on (seed, epoch) alone, so a
    `Position` is all that a checkpoint needs: `restore` goes on with the very next batch.
    """

    POOL = 16

    def __init__(
        self, task: Task[Any, Any], encoded: Encoded, batch_size: int, *, seed: int = 0
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size = {batch_size}; at least 1")
        if len(encoded) == 0:
            raise InputError("no rows to make batches of")
        self.task = task
        self.encoded = encoded
        self.batch_size = batch_size
        self.seed = seed
        self._position = Position()

    def __len__(self) -> int:
        """Batches in one epoch."""
        return -(-len(self.encoded) // self.batch_size)

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
        rows = list(range(len(self.encoded)))
        draw.shuffle(rows)
        lengths = self.encoded.lengths
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
            yield self.task.collate(self.encoded, order[index])
        self._position = Position(number + 1, 0)
