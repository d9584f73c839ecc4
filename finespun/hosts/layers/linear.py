"""Linear layers: nn.Linear and its subclasses, quantised ones, and GPT-2's Conv1D."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract import SiteShape
from finespun.errors import StateError
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.quantised import dequantise, quantised
from finespun.hosts.layers.slotted import Base
from finespun.hosts.layers.stored import Stored


class LinearHost(Host):
    """y = x Wᵀ + b with W (out, in)."""

    kind: ClassVar[str] = "linear"
    fusable: ClassVar[bool] = True
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


class QuantisedHost(LinearHost):
    """A linear layer whose weight is quantised: read dequantised, merged into a float weight."""

    fusable: ClassVar[bool] = False
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


class TransposedHost(LinearHost):
    """GPT-2's Conv1D: y = x V + b with V (in, out) = Wᵀ."""

    fusable: ClassVar[bool] = False

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.name, self.layer.weight.shape[1], self.layer.weight.shape[0])

    def read(self, stored: Stored) -> Tensor:
        return stored[0].T

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        super().write(W.T.contiguous(), bias)
