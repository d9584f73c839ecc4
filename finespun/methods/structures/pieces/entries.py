"""Updates of few entries: ΔW (out, in) is zero outside K places, drawn again or saved."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from finespun.contract.delta import Delta
from finespun.contract.site import Site
from finespun.errors import StateError
from finespun.kernels.entries import Entries, entries_linear
from finespun.methods.structures.pieces import masks


class EntriesDelta(Delta):
    """v (K,), the values at the trained entries `index` (K,): rising, counted row by row, int64."""

    reads_base = False

    def __init__(self, site: Site, index: Tensor, scale: float) -> None:
        super().__init__(site)
        self.scale = scale
        self.v = nn.Parameter(torch.zeros(len(index), device=site.device))
        self.keep(index.to(site.device))

    def keep(self, index: Tensor) -> None:
        """Hold the chosen entries."""
        self.hold("index", index)

    @property
    def index(self) -> Tensor:
        return self.held("index", self.v)

    @property
    def at(self) -> Entries:
        """The entries as the products need them, made anew when others are chosen."""
        index, known = self.index, self.__dict__.get("_at", (None, None, -1))
        if known[1] is not index or known[2] != index._version:
            shape = self.site.shape.out_features, self.site.shape.in_features
            known = (Entries(index, shape), index, index._version)
            self.__dict__["_at"] = known
        at: Entries = known[0]
        return at

    def sparse(self) -> tuple[Tensor, Tensor]:
        return self.index, self.v * self.scale

    def delta(self, w0: Tensor) -> Tensor:
        flat = torch.zeros(w0.numel(), dtype=self.v.dtype, device=self.v.device)
        return flat.index_copy(0, self.index, self.v * self.scale).view(w0.shape)

    def product(self, x: Tensor) -> Tensor:
        return entries_linear(x, self.v * self.scale, self.at)

    def direct(self, tokens: int, formed: bool) -> bool:
        return super().direct(tokens, formed) and not torch.compiler.is_compiling()


class ChosenEntriesDelta(EntriesDelta):
    """The entries cannot be drawn again: they are a buffer and saved with the parameters. All are 0
    until `select`."""

    per_sample: ClassVar[bool] = False
    entries: Tensor
    rule: str = "magnitude"

    def keep(self, index: Tensor) -> None:
        self.register_buffer("entries", index)

    @property
    def index(self) -> Tensor:
        learns = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if learns and self.__dict__.get("_seen") != self.entries._version:
            if not self.entries[-1:].any():
                how = "select(scores)" if self.rule == "given" else "driver.start_from_gradients"
                raise StateError(
                    f"mask={self.rule!r}: the entries of {self.site.shape.name!r} are not chosen "
                    f"yet; call {how} before training"
                )
            self.__dict__["_seen"] = self.entries._version
        return self.entries

    @torch.no_grad()
    def select(self, scores: Tensor) -> None:
        """Train the K entries of largest |scores| (out, in), or those of a boolean mask, from now
        on, from zero. Raises InputError for scores that cannot choose."""
        self.entries.copy_(masks.scored(scores, len(self.v), self.site.shape))
        self.v.zero_()

    def start_from(self, gradient: Tensor) -> None:
        if self.rule not in ("gradient", "snip"):
            raise StateError(f"mask={self.rule!r} does not look at gradients; try 'snip'")
        W = self.base_weight()
        self.select(gradient.to(W) * W if self.rule == "snip" else gradient)
