"""SHiRA: a chosen few entries of the weight are trained (arXiv 2406.13175)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from finespun.errors import InputError, PlanError, StateError
from finespun.kernels.entries import WORTH, Entries, entries_linear
from finespun.structures import masks
from finespun.structures.delta import Bank, Delta
from finespun.structures.site import Site, SiteShape
from finespun.structures.structure import Plan, Ranked, register

DRAWN, CHOSEN = ("random", "structured"), ("gradient", "snip", "given")
MASKS = (*DRAWN, "magnitude", *CHOSEN)


@register
@dataclass(frozen=True, kw_only=True)
class SHiRA(Ranked):
    """ΔW = c·S, S (out, in) zero outside K entries, whose values v (K,) are trained from zero:
    K = r·(in + out) numbers, as many as LoRA's, of high rank. c is 1 unless alpha is given.

    Good for: a rank as high as the mask allows, changing few entries of each weight.
    Not for: LoRA servers; the smallest adapters: it has as many numbers as LoRA.

    `mask` chooses the entries. "random": uniformly, by seed and site. "structured": the diagonal
    and evenly spaced rows (columns where out > in), as many as K allows. "magnitude": the K largest
    of |W0|, after the `skip`·K that other tasks have. "gradient": of |∇W|, "snip": of |W0 ∘ ∇W|,
    looked at before training (`driver.start_from_gradients`). "given": of scores, or a boolean
    mask, handed to `select`. The first two are regenerated, the others saved.
    Source: arXiv 2406.13175.
    """

    rank: int = 32
    mask: Literal["random", "structured", "magnitude", "gradient", "snip", "given"] = "random"
    skip: int = 0

    usual_scale = 1.0

    kind = "shira"
    source = "arXiv 2406.13175"
    aliases = {"r": "rank", "mask_type": "mask", "random_seed": "seed"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in MASKS:
            raise InputError(f"mask={self.mask!r} is not one of {', '.join(MASKS)}")
        if self.skip < 0 or (self.skip and self.mask != "magnitude"):
            raise InputError(f"skip={self.skip} needs mask='magnitude' and may not be negative")

    @property
    def wants_gradient(self) -> bool:
        return self.mask in ("gradient", "snip")

    def choose(self, site: Site) -> dict[str, Any]:
        shape = site.shape
        sides, size = shape.in_features + shape.out_features, shape.in_features * shape.out_features
        if (budget := self.rank * sides * (1 + self.skip)) > size:
            raise PlanError(
                f"rank={self.rank} asks for {budget} of the {size} entries of {shape.name!r} "
                f"({shape.out_features}x{shape.in_features}); at most "
                f"rank={size // sides // (1 + self.skip)}"
            )
        return {"rank": self.rank, "scale": self.scale}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "SHiRADelta":
        shape, count = site.shape, self.numbers(site.shape)
        scale = plan.choices[shape.name]["scale"]
        if self.mask == "random":
            return SHiRADelta(site, masks.random(shape, count, self.seed), scale)
        if self.mask == "structured":
            return SHiRADelta(site, masks.structured(shape, self.lines(shape), self.seed), scale)
        if self.mask == "magnitude":
            return SavedSHiRADelta(site, masks.largest(site.weight(), count, self.skip), scale)
        delta = SavedSHiRADelta(site, torch.zeros(count, dtype=torch.int64), scale)
        delta.rule = self.mask
        return delta

    def lines(self, shape: SiteShape) -> int:
        """Rows, or columns, of the structured mask."""
        return masks.whole_lines(shape, self.rank * (shape.in_features + shape.out_features))

    def numbers(self, shape: SiteShape) -> int:
        short, long = sorted((shape.out_features, shape.in_features))
        if self.mask == "structured":
            return self.lines(shape) * (long - 1) + short
        return self.rank * (short + long)

    def flops(self, shape: SiteShape, tokens: int = 1) -> int:
        """Entry by entry, or a dense product where more than one in `WORTH` is trained."""
        size, count = shape.in_features * shape.out_features, self.numbers(shape)
        return 2 * tokens * (count if WORTH * count <= size else size)


class SHiRADelta(Delta):
    """v (K,), the values at the trained entries `index` (K,): rising, counted row by row, int64."""

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
        """The entries as the products want them, made anew when others are chosen."""
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

    def forward(self, x: Tensor) -> Tensor:
        if not self.direct(0, False):
            return super().forward(x)
        return entries_linear(x, self.v * self.scale, self.at)

    def direct(self, tokens: int, formed: bool) -> bool:
        return not self.adjusted and not torch.compiler.is_compiling()


class SavedSHiRADelta(SHiRADelta):
    """The entries cannot be drawn again: they are a buffer and saved with the numbers. All are 0
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
