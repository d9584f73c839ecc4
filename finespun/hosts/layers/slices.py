"""Slices of a fused projection: each part of the output is a site of its own."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finespun.contract import SiteShape
from finespun.errors import StateError, TargetError
from finespun.hosts.layers.linear import LinearHost
from finespun.hosts.layers.slotted import Base
from finespun.hosts.layers.stored import Stored

QKV = ("q", "k", "v")


def span(part: str, width: int) -> tuple[int, int]:
    """The output columns of a part: q, k, v are thirds; "128-256" names columns 128 to 255.

    >>> span("k", 768)
    (256, 512)
    """
    if part in QKV and width % 3 == 0:
        third = width // 3
        return QKV.index(part) * third, (QKV.index(part) + 1) * third
    first, dash, last = part.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and int(first) < int(last) <= width:
        return int(first), int(last)
    raise TargetError(
        f"no part {part!r} of {width} outputs is known; try 'q', 'k', 'v' where 3 divides them, "
        f"or columns such as '0-{max(width // 3, 1)}'"
    )


class SliceHost(LinearHost):
    """Outputs start..end of a linear layer; its deltas lie in the layer under the part's name.
    Its base was computed for the whole layer, for the x that it was given."""

    fusable: ClassVar[bool] = False
    sliced: ClassVar[bool] = True

    def __init__(self, whole: LinearHost, part: str) -> None:
        super().__init__(whole.layer, f"{whole.name}:{part}", whole.adapter_set)
        self.whole, self.part = whole, part
        self.start, self.end = span(part, whole.shape.out_features)

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.name, self.end - self.start, self.whole.shape.in_features)

    def stored(self) -> Stored:
        return self.whole.stored()

    def restore(self, stored: Stored) -> None:
        self.whole.restore(stored)

    def read(self, stored: Stored) -> Tensor:
        return self.whole.read(stored)[self.start : self.end]

    def read_bias(self, stored: Stored) -> Tensor | None:
        return None if stored[1] is None else stored[1][self.start : self.end]

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        stored = self.whole.stored()
        full = self.whole.read(stored).detach().clone().to(W.dtype)
        full[self.start : self.end] = W
        moved = stored[1]
        if bias is not None and moved is not None:
            moved = moved.detach().clone()
            moved[self.start : self.end] = bias
        self.whole.write(full, moved if bias is not None else None)

    def deltas(self) -> nn.ModuleDict:
        found = super().deltas()[self.part]
        if not isinstance(found, nn.ModuleDict):
            raise StateError(f"{self.name!r} holds no parts")
        return found

    def held(self) -> dict[str, Any]:
        return self.deltas().__dict__["_modules"]


class SlicesHost:
    """Stands beside a fused layer whose parts are adapted: runs the layer once, then each part."""

    kind: ClassVar[str] = "parts"

    def __init__(self, whole: LinearHost) -> None:
        self.whole, self.parts = whole, dict[str, SliceHost]()

    def add(self, part: SliceHost) -> None:
        """Take in another part. Raises TargetError where it overlaps one that is there."""
        for other in self.parts.values():
            if part.start < other.end and other.start < part.end:
                raise TargetError(f"{part.name!r} and {other.name!r} overlap: name parts apart")
        self.parts[part.part] = part

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        pieces, end = [], 0
        for part in sorted(self.parts.values(), key=lambda p: p.start):
            pieces.append(y[..., end : part.start])
            own = y[..., part.start : part.end]
            pieces.append(part.forward(lambda _, own=own: own, x))
            end = part.end
        return torch.cat([*pieces, y[..., end:]], dim=-1)
