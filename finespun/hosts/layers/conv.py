"""Convolutions: W (out, in, k, ...) seen as (out, in·k·...)."""

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from finespun.contract import SiteShape
from finespun.errors import TargetError
from finespun.hosts.adapter_set import AdapterSet
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.stored import Stored


class ConvHost(Host):
    """A convolution in one to three dimensions, groups = 1: `down` convolves as the layer does,
    `up` is a 1x1 convolution."""

    kind: ClassVar[str] = "conv"
    featured: ClassVar[bool] = False
    layer: Any

    def __init__(self, layer: nn.Module, name: str, adapter_set: AdapterSet) -> None:
        super().__init__(layer, name, adapter_set)
        if self.layer.groups != 1:
            raise TargetError(
                f"{name!r} is a convolution of {self.layer.groups} groups; only groups=1 can be "
                "adapted: choose its 1x1 neighbours"
            )

    @property
    def shape(self) -> SiteShape:
        size = self.layer.weight.shape
        return SiteShape(self.name, size[0], math.prod(size[1:]), self.kind)

    def read(self, stored: Stored) -> Tensor:
        return stored[0].flatten(1)

    def multiply(self, x: Tensor, W: Tensor) -> Tensor:
        kernel = W.view(len(W), *self.layer.weight.shape[1:])
        return self.layer._conv_forward(x.to(W.dtype), kernel, None)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return (B @ h.flatten(-self._dims)).unflatten(-1, h.shape[-self._dims :])

    def spread(self, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * self._dims) if v.dim() else v

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        self.layer.weight.data = W.view(self.layer.weight.shape)
        if bias is not None:
            self.layer.bias.data = bias

    @property
    def _dims(self) -> int:
        return self.layer.weight.dim() - 2
