"""KAdaptation: Kronecker products of small shared matrices with low-rank ones (2203.16329)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta, Factors
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    must_divide,
    register,
)
from finespun.errors import InputError


@register
@dataclass(frozen=True, kw_only=True)
class KAdaptation(Ranked):
    """ΔW = c·Σ_i P_i ⊗ (U_i V_i), i = 1..n;  r·(in + out) parameters a site, n³ for the model.

    Good for: a rank of up to n²·r at the parameters of a LoRA of rank r.
    Not for: per-sample gradients, as the small matrices are shared.

    P_i (n, n) are shared by all sites, U_i (out/n, r) and V_i (r, in/n) a site's own; `terms` is n
    and must divide in and out. U starts at zero, V_i is drawn as LoRA's A, P with variance 1/n;
    c = alpha / r. Source: arXiv 2203.16329.
    """

    rank: int = 1
    terms: int = 4

    kind = "kadaptation"
    source = "arXiv 2203.16329"
    aliases = {**Ranked.aliases, "n": "terms"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.terms < 1:
            raise InputError(f"terms={self.terms} must be at least 1; try 4")

    def choose(self, site: Site) -> dict[str, Any]:
        must_divide("terms", self.terms, site.shape)
        return super().choose(site)

    def bank(self, plan: Plan) -> "Slow":
        bank = Slow(self.terms)
        drawn = torch.randn(bank.P.shape, generator=self.generator("", "P"))
        bank.P.data.copy_(drawn / self.terms**0.5)
        return bank

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "KAdaptationDelta":
        delta = KAdaptationDelta(site, Slow.at(bank, site), plan.choices[site.shape.name])
        delta.V.data.copy_(self.kaiming(site.shape.name, "V", delta.V.shape))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return self.rank_of(choice) * (shape.in_features + shape.out_features)

    def num_shared_parameters(self, plan: Plan) -> int:
        return self.terms**3

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return (
            2
            * tokens
            * (
                self.terms * self.num_parameters(shape, choice)
                + self.rank_of(choice) * self.terms**3
            )
        )


class Slow(Bank):
    """P (n, n, n), the n small matrices of all sites."""

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.P = nn.Parameter(torch.zeros(terms, terms, terms))


class KAdaptationDelta(Delta):
    """U (n, out/n, r) and V (n, r, in/n)."""

    per_sample = False

    def __init__(self, site: Site, bank: Slow, choice: Mapping[str, Any]) -> None:
        super().__init__(site, bank)
        self.scale, n, rank = choice["scale"], len(bank.P), choice["rank"]
        sizes = site.shape.out_features // n, site.shape.in_features // n
        self.U = nn.Parameter(torch.zeros(n, sizes[0], rank, device=site.device))
        self.V = nn.Parameter(torch.zeros(n, rank, sizes[1], device=site.device))

    @property
    def P(self) -> Tensor:
        """The bank's n small matrices, (n, n, n)."""
        bank: Any = self.bank
        P: Tensor = bank.P
        return P

    def low_rank(self) -> Factors:
        """Rank n²·r: P_i ⊗ (U_i V_i) = (P_i ⊗ U_i)(1 ⊗ V_i), row (i, a, ρ) reads slice a of x."""
        rows = torch.diag_embed(self.V.unsqueeze(-1).expand(-1, -1, -1, len(self.V)))
        A = rows.permute(0, 3, 1, 4, 2).flatten(3).flatten(0, 2)
        B = torch.einsum("iba,ior->boiar", self.P, self.U).flatten(2).flatten(0, 1)
        return A, B

    def product(self, x: Tensor) -> Tensor:
        n, r, width = self.V.shape
        h = x.to(self.V.dtype).reshape(-1, n, width) @ self.V.reshape(n * r, width).mT
        h = torch.einsum("taij,iba->tbij", h.unflatten(-1, (n, r)), self.P)
        y = h.flatten(2) @ self.U.transpose(1, 2).reshape(n * r, -1)
        return y.reshape(*x.shape[:-1], self.site.shape.out_features) * self.scale
