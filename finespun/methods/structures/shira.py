"""SHiRA: a chosen few entries of the weight are trained (arXiv 2406.13175)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from finespun.contract.delta import Bank
from finespun.contract.need import Need
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    must_be_one_of,
    register,
)
from finespun.errors import InputError, PlanError
from finespun.kernels.entries import WORTH
from finespun.methods.structures.pieces import masks
from finespun.methods.structures.pieces.entries import ChosenEntriesDelta, EntriesDelta

MASKS = ("random", "structured", "magnitude", "gradient", "snip", "given")


@register
@dataclass(frozen=True, kw_only=True)
class SHiRA(Ranked):
    """ΔW = c·S, S (out, in) zero outside K entries, whose values v (K,) are trained from zero:
    K = r·(in + out) parameters, as many as LoRA's, of high rank. c is 1 unless alpha is given.

    Good for: a rank as high as the mask allows, changing few entries of each weight.
    Not for: LoRA servers; the smallest adapters: it has as many parameters as LoRA.

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

    default_scale = 1.0

    kind = "shira"
    source = "arXiv 2406.13175"
    aliases = {"r": "rank", "mask_type": "mask", "random_seed": "seed"}

    def __post_init__(self) -> None:
        super().__post_init__()
        must_be_one_of("mask", self.mask, MASKS)
        if self.skip < 0 or (self.skip and self.mask != "magnitude"):
            raise InputError(f"skip={self.skip} needs mask='magnitude' and may not be negative")

    @property
    def needs(self) -> frozenset[Need]:
        if self.mask in ("gradient", "snip"):
            return frozenset({Need.GRADIENTS})
        return frozenset({Need.PYTHON} if self.mask == "given" else ())

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

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> EntriesDelta:
        shape, choice = site.shape, plan.choices[site.shape.name]
        count, scale = self.num_parameters(shape, choice), choice["scale"]
        if self.mask == "random":
            return EntriesDelta(site, masks.random(shape, count, self.seed), scale)
        if self.mask == "structured":
            return EntriesDelta(
                site, masks.structured(shape, self.lines(shape, choice), self.seed), scale
            )
        if self.mask == "magnitude":
            return ChosenEntriesDelta(site, masks.largest(site.weight(), count, self.skip), scale)
        delta = ChosenEntriesDelta(site, torch.zeros(count, dtype=torch.int64), scale)
        delta.rule = self.mask
        return delta

    def lines(self, shape: SiteShape, choice: Choice) -> int:
        """Rows, or columns, of the structured mask."""
        return masks.whole_lines(
            shape, self.rank_of(choice) * (shape.in_features + shape.out_features)
        )

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        short, long = sorted((shape.out_features, shape.in_features))
        if self.mask == "structured":
            return self.lines(shape, choice) * (long - 1) + short
        return self.rank_of(choice) * (short + long)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """Entry by entry, or a dense product where more than one in `WORTH` is trained."""
        size, count = shape.in_features * shape.out_features, self.num_parameters(shape, choice)
        return 2 * tokens * (count if WORTH * count <= size else size)
