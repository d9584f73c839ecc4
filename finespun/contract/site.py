"""Where a delta attaches, seen from the mathematics: a name, a shape and a weight to read."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class SiteShape:
    """What a plan remembers of a site; `kind` is "linear", "embedding", "conv" or "block"."""

    name: str
    out_features: int
    in_features: int
    kind: str = "linear"


@dataclass(frozen=True)
class Coupling:
    """Hidden features of a block that some of its layers write (side "out": their rows) and others
    read (side "in": their columns): attention's heads, or a feed-forward block's channels.

    The `units` (heads that share keys and values, or channels) are chosen or moved as one in all
    these layers; a layer with n of the features has n / units of each unit. `parts` are the pieces
    of a unit that layers with as many may choose alone: the query heads that share keys and
    values. `name` is the block's.
    """

    name: str
    side: Literal["in", "out"]
    units: int
    kind: Literal["heads", "channels"] = "channels"
    parts: int = 1


@runtime_checkable
class Site(Protocol):
    """A place that a delta can attach to. Hosts implement it; `TensorSite` needs no model.

    `weight()` is W0 as (out_features, in_features), dequantised where the base is quantised;
    `bias()` is b0 (out_features,) or None; `coupling` says what the layer shares with others of its
    block, None where it is not known.
    """

    @property
    def shape(self) -> SiteShape: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def coupling(self) -> Coupling | None: ...
    def weight(self) -> Tensor: ...
    def bias(self) -> Tensor | None: ...


@dataclass(frozen=True)
class TensorSite:
    """A site made of bare tensors: for files, conversion and tests, where there is no model.

    `value` is W0, shape (out_features, in_features); `offset` is b0, shape (out_features,).
    """

    name: str
    value: Tensor
    offset: Tensor | None = None
    kind: str = "linear"
    coupling: Coupling | None = None

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.name, self.value.shape[0], self.value.shape[1], self.kind)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    def weight(self) -> Tensor:
        return self.value

    def bias(self) -> Tensor | None:
        return self.offset
