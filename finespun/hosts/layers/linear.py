"""Linear layers: nn.Linear and its subclasses, quantised ones, and GPT-2's Conv1D."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract import Delta, SiteShape
from finespun.contract.delta import Factors
from finespun.errors import StateError
from finespun.hosts.layers.host import Host, Stored, hooked
from finespun.hosts.layers.layer import OWN, plain_class
from finespun.hosts.layers.quantised import dequantise, quantised
from finespun.hosts.layers.slotted import Base
from finespun.kernels.lowrank import low_rank_linear, low_rank_reference


class LinearHost(Host):
    """y = x Wᵀ + b with W (out, in)."""

    kind: ClassVar[str] = "linear"
    layer: Any

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.name, self.layer.out_features, self.layer.in_features)

    def stored(self) -> Stored:
        if quantised(self.layer):
            raise StateError(
                f"{self.name!r} was quantised after it was adapted: the update acts, but its "
                "weight cannot be read or merged; quantise first, then adapt or load"
            )
        return super().stored()

    def multiply(self, x: Tensor, W: Tensor) -> Tensor:
        return F.linear(x, W)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x.to(A.dtype), A)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        self.layer.weight.data = W
        if bias is not None:
            self.layer.bias.data = bias

    def _low_rank(self, delta: Delta, x: Tensor, formed: Factors | None) -> Tensor:
        if self._direct(delta, x, formed):
            return delta.forward(x)
        A, B = delta.factors() if formed is None else formed  # type: ignore[misc]
        return low_rank_reference(x, A, B, delta.scale, self._gain(delta))

    def _alone(self, base: Base, x: Tensor, delta: Delta, strength: float) -> Tensor:
        """The fused kernel, base product included, where the layer's own forward is nn.Linear's."""
        own = (
            plain_class(self.layer).forward is nn.Linear.forward and OWN not in self.layer.__dict__
        )
        if "low_rank" not in delta.written or not own or hooked(delta):
            return super()._alone(base, x, delta, strength)
        pair = self._formed(delta)
        if self._direct(delta, x, pair):
            return super()._alone(base, x, delta, strength)
        A, B = delta.factors() if pair is None else pair  # type: ignore[misc]
        s = delta.scale * strength
        drop, gain = self._dropout(delta) if delta.training else 0.0, self._gain(delta)
        y = low_rank_linear(x, self.layer.weight, self.layer.bias, A, B, s, gain, drop)
        moved = self._bias_change(delta)
        return y if moved is None else y + (moved * strength).to(y.dtype)


class QuantisedHost(LinearHost):
    """A linear layer whose weight is quantised: read dequantised, merged into a float weight."""

    writable: ClassVar[bool] = False

    @property
    def dtype(self) -> torch.dtype:
        return self.read(self.stored()).dtype

    def stored(self) -> Stored:
        return self.layer._parameters["weight"], self.layer._parameters.get("bias")

    def restore(self, stored: Stored) -> None:
        self.layer._parameters["weight"] = stored[0]
        if stored[1] is not None:
            self.layer._parameters["bias"] = stored[1]

    def read(self, stored: Stored) -> Tensor:
        return dequantise(self.layer, stored[0])

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        self.layer._parameters["weight"] = nn.Parameter(W, requires_grad=False)
        if bias is not None:
            self.layer._parameters["bias"] = nn.Parameter(bias, requires_grad=False)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if quantised(self.layer):
            return super().forward(base, x)
        weight, bias = self.layer.weight, self.layer.bias
        return super().forward(lambda z: F.linear(z.to(weight.dtype), weight, bias).to(z.dtype), x)

    def _alone(self, base: Base, x: Tensor, delta: Delta, strength: float) -> Tensor:
        return Host._alone(self, base, x, delta, strength)


class TransposedHost(LinearHost):
    """GPT-2's Conv1D: y = x V + b with V (in, out) = Wᵀ."""

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.name, self.layer.weight.shape[1], self.layer.weight.shape[0])

    def read(self, stored: Stored) -> Tensor:
        return stored[0].T

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        super().write(W.T.contiguous(), bias)

    def _alone(self, base: Base, x: Tensor, delta: Delta, strength: float) -> Tensor:
        return Host._alone(self, base, x, delta, strength)
