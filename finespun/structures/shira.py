"""SHiRA: a chosen few entries of the weight are trained (arXiv 2406.13175)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from finespun.errors import InputError, PlanError
from finespun.linalg import streams
from finespun.structures.delta import Bank, Delta
from finespun.structures.site import Site, SiteShape
from finespun.structures.structure import Plan, Ranked, register

MASKS = ("random", "structured", "magnitude", "given")


@register
@dataclass(frozen=True, kw_only=True)
class SHiRA(Ranked):
    """ΔW = c·S, S (out, in) zero outside K entries, whose values v (K,) are trained from zero:
    K = r·(in + out) numbers, as many as LoRA's, of high rank. c is 1 unless alpha is given.

    Good for: a rank as high as the mask allows, changing few entries of each weight.
    Not for: LoRA servers; the smallest adapters: it has as many numbers as LoRA.

    `mask` chooses the entries. "random": uniformly, by seed and site. "structured": the diagonal
    and evenly spaced rows (columns where out > in), as many as K allows. "magnitude": the K largest
    of |W0|, after the `skip`·K that other tasks have. "given": random until `select` is called,
    with |∇W| or |W0 ∘ ∇W| (SNIP), say. The first two are regenerated, the others saved.
    Source: arXiv 2406.13175.
    """

    rank: int = 32
    mask: Literal["random", "structured", "magnitude", "given"] = "random"
    skip: int = 0

    usual_scale = 1.0

    kind = "shira"
    source = "arXiv 2406.13175"
    aliases = {"r": "rank", "mask_type": "mask"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in MASKS:
            raise InputError(f"mask={self.mask!r} is not one of {', '.join(MASKS)}")
        if self.skip < 0 or (self.skip and self.mask != "magnitude"):
            raise InputError(f"skip={self.skip} needs mask='magnitude' and may not be negative")

    def choose(self, site: Site) -> dict[str, Any]:
        shape = site.shape
        budget = self.rank * (shape.in_features + shape.out_features) * (1 + self.skip)
        size = shape.in_features * shape.out_features
        if budget > size:
            raise PlanError(
                f"rank={self.rank} asks for {budget} of the {size} entries of {shape.name!r} "
                f"({shape.out_features}x{shape.in_features}); at most "
                f"rank={size // (shape.in_features + shape.out_features) // (1 + self.skip)}"
            )
        return {"rank": self.rank, "scale": self.scale}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "SHiRADelta":
        saved = self.mask in ("magnitude", "given")
        scale = plan.choices[site.shape.name]["scale"]
        return (SavedSHiRADelta if saved else SHiRADelta)(site, self.index(site), scale)

    def index(self, site: Site) -> Tensor:
        """The chosen entries, rising, counted row by row, int64 (K,)."""
        shape, count = site.shape, self.numbers(site.shape)
        if self.mask == "structured":
            return self._structured(shape)
        if self.mask == "magnitude":
            return largest(site.weight(), count, self.skip)
        key = streams.key(self.seed, shape.name, "mask")
        return streams.choice(key, shape.out_features * shape.in_features, count).sort().values

    def _structured(self, shape: SiteShape) -> Tensor:
        lines = self._lines(shape)
        short, long = sorted((shape.out_features, shape.in_features))
        gap = short // lines
        first = int(streams.integers(streams.key(self.seed, shape.name, "mask"), 1, gap))
        mask = torch.eye(short, long, dtype=torch.bool)
        mask[first : first + lines * gap : gap] = True
        return (
            (mask if shape.out_features <= shape.in_features else mask.T).flatten().nonzero()[:, 0]
        )

    def _lines(self, shape: SiteShape) -> int:
        short, long = sorted((shape.out_features, shape.in_features))
        return min(short, (self.rank * (short + long) - short) // max(long - 1, 1))

    def numbers(self, shape: SiteShape) -> int:
        if self.mask != "structured":
            return self.rank * (shape.in_features + shape.out_features)
        short, long = sorted((shape.out_features, shape.in_features))
        return self._lines(shape) * (long - 1) + short

    def flops(self, shape: SiteShape, tokens: int = 1) -> int:
        """Entry by entry for few rows, else a dense product."""
        size, count = shape.in_features * shape.out_features, self.numbers(shape)
        return 2 * tokens * (count if sparse(tokens, count, size) else size)


class SHiRADelta(Delta):
    """v (K,); `index` (K,) are its places in the weight."""

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
        """The trained entries, rising, counted row by row, int64 (K,)."""
        return self.held("index", self.v)

    def delta(self, w0: Tensor) -> Tensor:
        flat = torch.zeros(w0.numel(), dtype=self.v.dtype, device=self.v.device)
        return flat.index_copy(0, self.index, self.v * self.scale).view(w0.shape)

    def forward(self, x: Tensor) -> Tensor:
        shape, rows = self.site.shape, x.numel() // x.shape[-1]
        if not self.direct(rows, False):
            return super().forward(x)
        o, i = self.index // shape.in_features, self.index % shape.in_features
        terms = x.to(self.v.dtype)[..., i] * (self.v * self.scale)
        out = torch.zeros(*x.shape[:-1], shape.out_features, dtype=terms.dtype, device=x.device)
        return out.index_add(-1, o, terms)

    def direct(self, tokens: int, formed: bool) -> bool:
        shape = self.site.shape
        few = sparse(tokens, len(self.v), shape.in_features * shape.out_features)
        return few and not self.adjusted

    @torch.no_grad()
    def switch_on(self, W: Tensor, strength: float = 1.0) -> Tensor:
        """Add strength·ΔW to the K entries of W (out, in) in place, each rounded once to its
        dtype; returns what stood there, for `switch_back`. Raises InputError unless contiguous."""
        flat = _flat(W)
        before = flat[self.index]
        after = before.to(self.v.dtype) + strength * self.scale * self.v
        flat.index_copy_(0, self.index, after.to(W.dtype))
        return before

    @torch.no_grad()
    def switch_back(self, W: Tensor, before: Tensor) -> None:
        """Put back what `switch_on` returned: W is what it was, bit for bit."""
        _flat(W).index_copy_(0, self.index, before)


class SavedSHiRADelta(SHiRADelta):
    """The places cannot be drawn again: they are a buffer and saved with the numbers."""

    per_sample: ClassVar[bool] = False
    entries: Tensor

    def keep(self, index: Tensor) -> None:
        self.register_buffer("entries", index)

    @property
    def index(self) -> Tensor:
        return self.entries

    @torch.no_grad()
    def select(self, scores: Tensor) -> None:
        """Train the K entries of largest |scores| (out, in) from now on, from zero."""
        shape = self.site.shape
        if scores.shape != (shape.out_features, shape.in_features):
            raise InputError(
                f"scores for {shape.name!r} are {tuple(scores.shape)}, "
                f"expected ({shape.out_features}, {shape.in_features})"
            )
        self.entries.copy_(largest(scores, len(self.v)))
        self.v.zero_()


def largest(scores: Tensor, count: int, skip: int = 0) -> Tensor:
    """Places, rising, of the entries that rank skip·count + 1 .. (skip + 1)·count by |scores|."""
    ranked = scores.detach().float().abs().flatten().topk((skip + 1) * count).indices
    return ranked[skip * count :].sort().values


def sparse(tokens: int, count: int, size: int) -> bool:
    """Whether gathering `count` entries for each row beats a dense product of `size` entries."""
    return 4 * tokens * count < size


def _flat(W: Tensor) -> Tensor:
    if not W.is_contiguous():
        raise InputError(f"a weight {tuple(W.shape)} that is not contiguous cannot be switched")
    return W.view(-1)
