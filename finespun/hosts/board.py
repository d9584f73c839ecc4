"""The board: one model's registered adapters, which of them are active, and for which rows.

Layers read it on every forward pass; switching between activated adapters changes this object only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from finespun.errors import InputError, StateError, nearest
from finespun.hosts.flat import FlatState
from finespun.hosts.forming import Former
from finespun.structures import Bank, Delta, Plan, Structure

Weights = tuple[tuple[str, float], ...]
Rows = tuple[str | None, ...]


@dataclass
class Entry:
    """One registered adapter: its plan always, its modules only once activated or trained.

    `trained` lists modules of which the adapter holds its own copy (a fresh head, say).
    """

    name: str
    structure: Structure
    plan: Plan
    trained: tuple[str, ...] = ()
    scale: float = 1.0
    deltas: dict[str, Delta] = field(default_factory=dict)
    copies: dict[str, nn.Module] = field(default_factory=dict)
    bank: Bank | None = None
    flat: FlatState | None = None
    former: Former | None = None

    @property
    def live(self) -> bool:
        """Whether the modules exist."""
        return bool(self.deltas or self.copies)


class Board:
    """Shared by all adapted layers of one model."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.active: Weights = ()
        self.rows: Rows | None = None
        self.merged: dict[str, float] = {}
        self.kept: dict[str, tuple[Tensor, Tensor | None]] | None = None

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            raise InputError(f"no adapter is called {name!r}; {nearest(name, self.entries)}")
        return self.entries[name]

    def weights(self, wanted: str | Sequence[str] | Mapping[str, float] | None) -> Weights:
        """What the user asked for as (name, weight) pairs, names checked."""
        if wanted is None:
            return ()
        if isinstance(wanted, str):
            wanted = {wanted: 1.0}
        if not isinstance(wanted, Mapping):
            wanted = dict.fromkeys(wanted, 1.0)
        return tuple((self[name].name, float(weight)) for name, weight in wanted.items())

    def in_force(self) -> Weights:
        """The active adapters that are not merged into the weights, strengths included."""
        return tuple(
            (name, weight * self.entries[name].scale)
            for name, weight in self.active
            if name not in self.merged
        )

    def index(self, length: int, module: str) -> list[tuple[str, Tensor]]:
        """For a leading dimension of `length`: each adapter's row numbers, rows without one left
        out. The rows asked for are repeated as blocks where a layer sees a multiple of them (beams,
        flattened tokens). Raises StateError where they cannot be mapped."""
        rows = self.rows or ()
        if not rows or length % len(rows):
            raise StateError(
                f"{module!r} was given {length} rows while rows() names {len(rows)}: "
                "they cannot be told apart here"
            )
        block = length // len(rows)
        found: dict[str, list[int]] = {}
        for row, name in enumerate(rows):
            if name is not None:
                found.setdefault(name, []).extend(range(row * block, (row + 1) * block))
        return [(name, torch.tensor(numbers)) for name, numbers in found.items()]
