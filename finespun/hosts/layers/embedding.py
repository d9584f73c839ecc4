"""Embeddings: a table (rows, width) seen as a weight (out = width, in = rows)."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract import SiteShape
from finespun.errors import TargetError
from finespun.hosts.adapter_set import AdapterSet
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.stored import Stored


class EmbeddingHost(Host):
    """x holds row numbers; ΔW x is column x of ΔW. Only updates with factors fit: a dense one would
    be as large as the table."""

    kind: ClassVar[str] = "embedding"
    featured: ClassVar[bool] = False
    layer: Any

    def __init__(self, layer: nn.Module, name: str, adapter_set: AdapterSet) -> None:
        super().__init__(layer, name, adapter_set)
        if self.layer.max_norm is not None:
            raise TargetError(f"{name!r} renormalises its rows (max_norm) and cannot be adapted")

    @property
    def shape(self) -> SiteShape:
        rows, width = self.layer.weight.shape
        return SiteShape(self.name, width, rows, self.kind)

    def read(self, stored: Stored) -> Tensor:
        return stored[0].T

    def multiply(self, x: Tensor, W: Tensor) -> Tensor:
        found = F.embedding(x, W.T, self.layer.padding_idx)
        scale = getattr(self.layer, "embed_scale", None)  # Gemma's and BART's own tables
        return found if scale is None else found * torch.as_tensor(scale).to(found)

    def _flat(self, x: Tensor, output: bool = False) -> Tensor:
        return x.flatten(0, -2) if output else x.flatten()

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        self.layer.weight.data = W.T.contiguous()
