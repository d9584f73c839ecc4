"""LoHa: two low-rank matrices multiplied entry by entry, of rank r² (arXiv 2108.06098)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta, Factors
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
class LoHa(Ranked):
    """ΔW = c·(B1·A1) ∘ (B2·A2);  A1, A2 (r, in), B1, B2 (out, r);  2·r·(in + out) parameters.

    Good for: rank up to r² from two pairs of rank r.
    Not for: fast steps: ΔW is formed whole, or multiplied at rank r².

    The rank is up to r², and the factors are exact: row o of B is B1[o] ⊗ B2[o], column i of A is
    A1[:, i] ⊗ A2[:, i]. They are multiplied with where r²·(in + out) < in·out, the dense form
    elsewhere. A2 starts at zero, the others uniform with variance 1/(3·columns).
    Source: arXiv 2108.06098; for adapters arXiv 2309.14859.
    """

    kind = "loha"
    source = "arXiv 2108.06098"
    aliases = {"r": "rank"}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "LoHaDelta":
        choice = plan.choices[site.shape.name]
        cls = LoHaFactors if factored(choice["rank"], site.shape) else LoHaDelta
        delta = cls(site, choice["rank"], choice["scale"])
        for name in ("A1", "B1", "B2"):
            drawn = delta.get_parameter(name).data
            drawn.copy_(self.kaiming(site.shape.name, name, drawn.shape))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return 2 * self.rank_of(choice) * (shape.in_features + shape.out_features)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """Forming the factors, or ΔW, once; then products of rank r², or dense."""
        factors = self.rank_of(choice) ** 2 * (shape.in_features + shape.out_features)
        size = shape.in_features * shape.out_features
        if factored(self.rank_of(choice), shape):
            return (1 + 2 * tokens) * factors
        return (4 * self.rank_of(choice) + 1 + 2 * tokens) * size


def factored(rank: int, shape: SiteShape) -> bool:
    """Whether rank r² is cheaper than a dense product."""
    out, inner = shape.out_features, shape.in_features
    return rank**2 * (inner + out) < inner * out


class LoHaDelta(Delta):
    """A1, A2 (r, in) and B1, B2 (out, r)."""

    reads_base = False

    A1: nn.Parameter
    A2: nn.Parameter
    B1: nn.Parameter
    B2: nn.Parameter

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site)
        self.scale = scale
        for side in "12":
            down = torch.zeros(rank, site.shape.in_features, device=site.device)
            up = torch.zeros(site.shape.out_features, rank, device=site.device)
            self.register_parameter(f"A{side}", nn.Parameter(down))
            self.register_parameter(f"B{side}", nn.Parameter(up))

    def products(self) -> list[Product]:
        """B1·A1 and B2·A2, whose entries are multiplied; none behind a gate."""
        if self.dead or self.gating is not None:
            return []
        return [
            Product.of(lambda: self.B1, lambda: self.A1),
            Product.of(lambda: self.B2, lambda: self.A2),
        ]

    def delta(self, w0: Tensor) -> Tensor:
        return self.scale * (self.B1 @ self.A1) * (self.B2 @ self.A2)


class LoHaFactors(LoHaDelta):
    """The same, multiplied through its exact factors of rank r²."""

    def low_rank(self) -> Factors:
        A = (self.A1[:, None] * self.A2).flatten(0, 1)
        return A, (self.B1[:, :, None] * self.B2[:, None]).flatten(1)
