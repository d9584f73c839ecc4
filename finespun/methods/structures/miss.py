"""MiSS: one small matrix repeated over the inputs (arXiv 2409.15371)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta, Factors
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
class MiSS(Ranked):
    """ΔW[o, i] = c·D[i mod r, o];  D (r, out), zero at the start;  r·out parameters, rank r.

    Good for: one matrix instead of two: half of LoRA's parameters in a square layer.
    Not for: layers much wider in outputs than in inputs: there it saves little.

    As factors, B = Dᵀ and A repeats the identity: inputs i, i + r, i + 2r .. are added up and
    multiplied by D. c = alpha / r is 1 unless alpha is given, as in the paper.
    Source: arXiv 2409.15371.
    """

    rank: int = 64

    default_scale = 1.0

    kind = "miss"
    source = "arXiv 2409.15371"
    aliases = {"r": "rank", "miss_dropout": "dropout"}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "MiSSDelta":
        choice = plan.choices[site.shape.name]
        return MiSSDelta(site, choice["rank"], choice["scale"])

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return self.rank_of(choice) * shape.out_features

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """Adding inputs up, then one product with D."""
        return tokens * (shape.in_features + 2 * self.rank_of(choice) * shape.out_features)


class MiSSDelta(Delta):
    """D (r, out)."""

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site)
        self.scale = scale
        self.D = nn.Parameter(torch.zeros(rank, site.shape.out_features, device=site.device))

    def low_rank(self) -> Factors:
        eye = torch.eye(len(self.D), dtype=self.D.dtype, device=self.D.device)
        inner = self.site.shape.in_features
        return eye.repeat(1, -(-inner // len(eye)))[:, :inner], self.D.T

    def product(self, x: Tensor) -> Tensor:
        return fold(x.to(self.D.dtype), len(self.D)) @ self.D * self.scale


def fold(x: Tensor, r: int) -> Tensor:
    """Add up inputs i, i + r, i + 2r ..: x (..., in) -> (..., r)."""
    return F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)
