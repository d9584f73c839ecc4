"""A registered adapter as one flat tensor: bytes, and a table of where each tensor lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ALIGN = 16


class Slot(NamedTuple):
    """Where one tensor lies in the bytes."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class PackedTensors:
    """`data` (bytes,) uint8 holds every tensor of an adapter; `table` maps names to slots."""

    data: Tensor
    table: Mapping[str, Slot]

    @classmethod
    def pack(cls, tensors: Mapping[str, Tensor]) -> "PackedTensors":
        """Copy the tensors into one buffer, each on a 16-byte boundary."""
        table, end = {}, 0
        for name, tensor in tensors.items():
            table[name] = Slot(end, tensor.shape, tensor.dtype)
            end += -(-tensor.nbytes // ALIGN) * ALIGN
        data = torch.zeros(end, dtype=torch.uint8)
        flat = cls(data, table)
        for name, view in flat.tensors().items():
            view.copy_(tensors[name].detach())
        return flat

    def tensors(self) -> dict[str, Tensor]:
        """Views of all tensors by name."""
        return {
            name: self.data[slot.offset : slot.offset + slot.shape.numel() * slot.dtype.itemsize]
            .view(slot.dtype)
            .view(slot.shape)
            for name, slot in self.table.items()
        }
