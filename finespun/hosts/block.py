"""Bypasses: h ← F(h) + c·ΔW h around a whole block F."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finespun.errors import StateError, TargetError
from finespun.hosts.host import Base, Host, Stored
from finespun.structures import SiteShape


class BlockHost(Host):
    """A block whose first input and first output are hidden states (..., width)."""

    kind: ClassVar[str] = "block"

    @property
    def width(self) -> int:
        """The hidden size, read from the block's first linear layer or norm."""
        for module in self.layer.modules():
            if isinstance(module, nn.Linear):
                return module.in_features
            if isinstance(module, nn.LayerNorm):
                return int(module.normalized_shape[-1])
        raise TargetError(f"{self.name!r} has no linear layer or norm to read its width from")

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.name, self.width, self.width, self.kind)

    def _first(self) -> nn.Parameter:
        return next(p for n, p in self.layer.named_parameters() if "deltas." not in n)

    @property
    def dtype(self) -> torch.dtype:
        return self._first().dtype

    @property
    def device(self) -> torch.device:
        return self._first().device

    def stored(self) -> Stored:
        return self.weight(), None

    def weight(self) -> Tensor:
        raise StateError(f"{self.name!r} is a block: it has no weight of its own")

    def bias(self) -> Tensor | None:
        return None

    def multiply(self, x: Tensor, W: Tensor) -> Tensor:
        return nn.functional.linear(x, W)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return nn.functional.linear(x.to(A.dtype), A)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return nn.functional.linear(h, B)

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        raise StateError(f"{self.name!r} is bypassed, not rewritten: nothing can be merged into it")

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise StateError(f"{self.name!r} was called without hidden states to bypass")
        out = base(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        added = super().forward(lambda _: first, hidden)
        return (added, *out[1:]) if isinstance(out, tuple) else added
