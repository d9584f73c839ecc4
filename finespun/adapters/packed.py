"""A registered adapter's tensors in one buffer: bytes, and a table of where each tensor lies."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from finespun.adapters.keys import Key

ALIGN = 16


class Slot(NamedTuple):
    """Where one tensor lies in the bytes."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


Table = Mapping[Key, Slot]


def table_of(tensors: Mapping[Key, Tensor]) -> dict[Key, Slot]:
    """Where each tensor will lie, on a 16-byte boundary."""
    table, end = {}, 0
    for key in sorted(tensors, key=str):  # files list theirs in any order
        tensor = tensors[key]
        table[key] = Slot(end, tensor.shape, tensor.dtype)
        end += -(-tensor.nbytes // ALIGN) * ALIGN
    return table


class PackedTensors(Mapping[Key, Tensor]):
    """`data` (bytes,) uint8 holds every tensor of an adapter; `table` maps keys to slots. What is
    given out are views: whoever writes into one changes the adapter."""

    __slots__ = ("data", "table")

    def __init__(self, data: Tensor, table: Table) -> None:
        self.data, self.table = data, table

    @classmethod
    def pack(cls, tensors: Mapping[Key, Tensor], table: Table | None = None) -> "PackedTensors":
        """Copy the tensors into one buffer, laid out by `table` where that is given: it then says
        the dtypes too."""
        table = table_of(tensors) if table is None else table
        last = max(table.values(), default=Slot(0, torch.Size([0]), torch.uint8))
        end = last.offset + -(-_bytes(last) // ALIGN) * ALIGN
        packed = cls(torch.zeros(end, dtype=torch.uint8), table)
        for key, view in packed.items():
            view.copy_(tensors[key].detach())
        return packed

    def __getitem__(self, key: Key) -> Tensor:
        slot = self.table[key]
        held = self.data[slot.offset : slot.offset + _bytes(slot)]
        return held.view(slot.dtype).view(slot.shape)

    def __contains__(self, key: object) -> bool:
        return key in self.table

    def __iter__(self) -> Iterator[Key]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


def _bytes(slot: Slot) -> int:
    return slot.shape.numel() * slot.dtype.itemsize
