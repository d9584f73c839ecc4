"""The adapted layer: a host's own module object with a subclass put in front of its class.

    y = base(x) + Σ c_i [ drop_i(x) (W_i − W0)ᵀ + (b_i − b0) ],   W_i = map_weight_i(W0)

always from the original W0. The layer knows no method by name: it picks the fused kernel where a
delta has factors, else `through`, else the dense form; with a hook on the delta, its `forward`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.errors import StateError
from finespun.hosts.board import Board
from finespun.hosts.layer import plain_class
from finespun.kernels.lowrank import low_rank_linear, low_rank_reference
from finespun.structures import Delta, SiteShape

Base = Callable[..., Any]
_GLOBAL = nn.modules.module


class Host:
    """Where deltas attach at one module; the object beside the layer that speaks for it.

    A host is also the Site that its deltas see. Five verbs hide the kind of layer: `weight()` as
    (out, in), `multiply(x, W)`, `down(x, A)`, `up(h, B)` and `write(W)`. `gain` (scalar or (out,))
    scales what reaches the trained numbers; `overlay` adds a term that is never saved or merged.
    """

    kind: ClassVar[str] = ""
    gain: Tensor | None = None
    overlay: Callable[[Tensor], Tensor] | None = None

    def __init__(self, layer: nn.Module, name: str, board: Board) -> None:
        self.layer, self.name, self.board = layer, name, board
        self.ran = False

    @property
    def shape(self) -> SiteShape:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self.weight().dtype

    @property
    def device(self) -> torch.device:
        return self.weight().device

    def weight(self) -> Tensor:
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        raise NotImplementedError

    def multiply(self, x: Tensor, W: Tensor) -> Tensor:
        """x times W (out, in), without the bias."""
        raise NotImplementedError

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """The low-rank path's first half: x times A (r, in)."""
        return self.multiply(x, A)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        """The second half: h (..., r) times B (out, r)."""
        raise NotImplementedError

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        """Make W (out, in) and, where given, bias (out,) the layer's own."""
        raise NotImplementedError

    def deltas(self) -> "nn.ModuleDict":
        """Adapter name -> Delta, registered in the layer."""
        found = self.layer.deltas
        if not isinstance(found, nn.ModuleDict):
            raise StateError(f"{self.name!r} has an attribute 'deltas' of its own")
        return found

    def delta(self, adapter: str) -> Delta:
        """This site's delta of one adapter."""
        found = self.deltas()[adapter]
        if not isinstance(found, Delta):
            raise StateError(f"{adapter!r} at {self.name!r} is a {type(found).__name__}, no delta")
        return found

    def _held(self) -> dict[str, Delta]:
        """Adapter name -> Delta without nn.ModuleDict's overhead: read on every forward pass."""
        return self.layer.__dict__["_modules"]["deltas"].__dict__["_modules"]

    # --- forward --------------------------------------------------------------------------------
    def forward(self, base: Base, x: Tensor) -> Tensor:
        """The adapted output for x, where `base` computes the layer's own."""
        if not torch.compiler.is_compiling():
            self.ran = True
        if self.board.rows is not None:
            return self._by_rows(base, x)
        found = self._held()
        active = [(found[n], c) for n, c in self.board.in_force() if n in found and c != 0.0]
        if len(active) == 1:
            y = self._alone(base, x, *active[0])
        else:
            y = base(x)
            for delta, strength in active:
                y = y + self.change(delta, strength, x, base).to(y.dtype)
        if self.overlay is not None and self.board.active:
            y = y + self.overlay(x).to(y.dtype)
        return y

    def _alone(self, base: Base, x: Tensor, delta: Delta, strength: float) -> Tensor:
        """One active delta: the cheapest way to the whole output."""
        simple = strength == 1.0 and not self._drops(delta) and not hooked(delta)
        if simple and self._goes_through(delta):
            return delta.through(x, base)
        y = base(x)
        return y + self.change(delta, strength, x, base).to(y.dtype)

    def _by_rows(self, base: Base, x: Tensor) -> Tensor:
        """Another adapter, or none, for each row of x."""
        found = self._held()
        y: Tensor = base(x)
        if y.shape[0] != x.shape[0]:
            raise StateError(f"{self.name!r} changes the number of rows; rows() cannot follow")
        strength = {n: e.scale for n, e in self.board.entries.items()}
        for name, numbers in self.board.index(x.shape[0], self.name):
            if name in found and strength[name] != 0.0:
                at = numbers.to(x.device)
                part = x.index_select(0, at)
                y = y.index_add(
                    0, at, self.change(found[name], strength[name], part, base).to(y.dtype)
                )
        return y

    def change(self, delta: Delta, strength: float, x: Tensor, base: Base) -> Tensor:
        """c [ drop(x) ΔWᵀ + (b − b0) ] for one delta, in the precision of its numbers."""
        if self._drops(delta):
            x = F.dropout(x, self._dropout(delta), training=True)
        moved = self._bias_change(delta)
        if hooked(delta):
            if self.gain is not None:
                raise StateError(
                    f"a gain at {self.name!r} needs a delta without hooks; remove them"
                )
            change = delta(x)
        elif "low_rank" in delta.written:
            former = self.board.entries[self._owner(delta)].former
            change = self._low_rank(delta, x, None if former is None else former.factors(delta))
        elif self._goes_through(delta):
            return (delta.through(x, base) - base(x)) * strength
        else:
            w0 = delta.base_weight()
            change = self._dense(x.to(w0.dtype), delta.dense(w0))
        return (change if moved is None else change + moved) * strength

    def _low_rank(self, delta: Delta, x: Tensor, formed: tuple[Tensor, Tensor] | None) -> Tensor:
        tokens = x.numel() // max(x.shape[-1], 1)
        if self.gain is None and delta.direct(tokens, formed is not None):
            return delta.forward(x)
        A, B = delta.factors() if formed is None else formed  # type: ignore[misc]
        return low_rank_reference(x, A, B, delta.scale, self.gain)

    def _dense(self, x: Tensor, W: Tensor) -> Tensor:
        if self.gain is None:
            return self.multiply(x, W)
        own = self.multiply(x.detach(), W) * self.gain
        return self.multiply(x, W.detach()) + (own - own.detach())

    def _bias_change(self, delta: Delta) -> Tensor | None:
        moved = delta.bias_change() if "map_bias" in delta.written else None
        if moved is None or self.gain is None:
            return moved
        own = moved * self.gain
        return moved.detach() + (own - own.detach())

    def _goes_through(self, delta: Delta) -> bool:
        return "through" in delta.written and self.gain is None and delta.origin is None

    def _owner(self, delta: Delta) -> str:
        return str(delta.__dict__["owner"])

    def _dropout(self, delta: Delta) -> float:
        return self.board.entries[self._owner(delta)].structure.dropout

    def _drops(self, delta: Delta) -> bool:
        return delta.training and self._dropout(delta) > 0.0


class LinearHost(Host):
    """A linear layer, y = x Wᵀ + b with W (out, in); quantised ones through `dequantize`."""

    kind: ClassVar[str] = "linear"
    layer: nn.Linear

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.name, self.layer.out_features, self.layer.in_features)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    def weight(self) -> Tensor:
        return self.layer.weight

    def bias(self) -> Tensor | None:
        return self.layer.bias

    def multiply(self, x: Tensor, W: Tensor) -> Tensor:
        return F.linear(x, W)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        self.layer.weight.data = W
        if bias is not None:
            self.layer.bias.data = bias

    def _alone(self, base: Base, x: Tensor, delta: Delta, strength: float) -> Tensor:
        """The fused kernel, base product included, where the layer's own forward is nn.Linear's."""
        own = plain_class(self.layer).forward is nn.Linear.forward
        if "low_rank" not in delta.written or not own or hooked(delta):
            return super()._alone(base, x, delta, strength)
        former = self.board.entries[self._owner(delta)].former
        pair = None if former is None else former.factors(delta)
        tokens = x.numel() // max(x.shape[-1], 1)
        if self.gain is None and delta.direct(tokens, pair is not None):
            return super()._alone(base, x, delta, strength)
        A, B = delta.factors() if pair is None else pair  # type: ignore[misc]
        s = delta.scale * strength
        drop = self._dropout(delta) if delta.training else 0.0
        y = low_rank_linear(x, self.layer.weight, self.layer.bias, A, B, s, self.gain, drop)
        moved = self._bias_change(delta)
        return y if moved is None else y + (moved * strength).to(y.dtype)


def hooked(module: nn.Module) -> bool:
    """Whether anybody watches this module's forward or backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _GLOBAL._global_forward_hooks
        or _GLOBAL._global_forward_pre_hooks
        or _GLOBAL._global_backward_hooks
        or _GLOBAL._global_backward_pre_hooks
    )
