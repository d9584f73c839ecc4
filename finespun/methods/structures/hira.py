"""HiRA: the base weight times a low-rank matrix, entry by entry (ICLR 2025)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta
from finespun.contract.products import Product
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    register,
)


@register
@dataclass(frozen=True, kw_only=True)
class HiRA(Ranked):
    """ΔW = W0 ∘ (c·B·A);  A (r, in), B (out, r);  r·(in + out) parameters, rank up to r·rank(W0).

    Good for: an update of high rank at LoRA's count, relative to the base weight.
    Not for: LoRA servers; sparse bases, whose zeros stay zero.

    c = alpha / r is 1 unless alpha is given: the paper has no such factor. The update is relative
    to W0, so good learning rates are several times LoRA's. B starts at zero, A is drawn as LoRA's.
    Source: openreview.net/forum?id=TwJrTz9cRS; with a factor c in arXiv 2601.22708.
    """

    rank: int = 32

    default_scale = 1.0

    kind = "hira"
    source = "arXiv 2601.22708"

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "HiRADelta":
        choice, name = plan.choices[site.shape.name], site.shape.name
        delta = HiRADelta(site, choice["rank"], choice["scale"])
        delta.A.data.copy_(self.kaiming(name, "A", delta.A.shape))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return self.rank_of(choice) * (shape.in_features + shape.out_features)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """Forming B·A and its product with W0 once, then a dense product."""
        size = shape.in_features * shape.out_features
        return (2 * self.rank_of(choice) + 1) * size + 2 * tokens * size


class HiRADelta(Delta):
    """A (r, in) and B (out, r)."""

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site)
        out, inner, device = site.shape.out_features, site.shape.in_features, site.device
        self.scale = scale
        self.A = nn.Parameter(torch.zeros(rank, inner, device=device))
        self.B = nn.Parameter(torch.zeros(out, rank, device=device))

    def products(self) -> list[Product]:
        """c·B·A, which W0 multiplies."""
        return [] if self.dead else [Product.of(lambda: self.B, lambda: self.A, self.scale)]

    def delta(self, w0: Tensor) -> Tensor:
        return w0 * (self.B @ (self.A * self.scale))
