"""DeLoRA: rank-one terms of unit length under one trained strength (arXiv 2503.18225)."""

from dataclasses import dataclass
from typing import Literal

import torch
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
from finespun.errors import InputError


@register
@dataclass(frozen=True, kw_only=True)
class DeLoRA(Ranked):
    """ΔW = (λ/r)·Σ_i b_i a_iᵀ / (‖b_i‖·‖a_i‖)·diag(ν);  a_i rows of A (r, in), b_i columns of
    B (out, r), ν_j the norm of column j of W0.

    Good for: long training and high learning rates: the update cannot outgrow its bound.
    Not for: the smallest adapters: it has as many parameters as LoRA.

    A, B and λ are trained: r·(in + out) + 1 parameters, rank r. λ starts at alpha, 15 unless given,
    and bounds the update: ‖ΔW diag(ν)⁻¹‖ <= λ. Lengths below 1e-4 count as 1e-4, so that B = 0, the
    `start` "zero", is the base; but the first step then jumps to nearly the whole bound. A "drawn"
    B avoids that and is the paper's, which takes the first update away: ask for an exact start.
    Source: arXiv 2503.18225.
    """

    start: Literal["zero", "drawn"] = "zero"

    kind = "delora"
    source = "arXiv 2503.18225"
    aliases = {"r": "rank", "delora_lambda": "alpha", "module_dropout": "dropout"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("zero", "drawn"):
            raise InputError(f"start={self.start!r} is not known; try 'zero' or 'drawn'")

    @property
    def starts_at_zero(self) -> bool:
        return self.start == "zero"

    @property
    def strength(self) -> float:
        """λ at the start."""
        return 15.0 if self.alpha is None else self.alpha

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "DeLoRADelta":
        name = site.shape.name
        delta = DeLoRADelta(site, plan.choices[name]["rank"], self.strength)
        delta.A.data.copy_(self.kaiming(name, "A", delta.A.shape))
        if self.start == "drawn":
            delta.B.data.copy_(self.kaiming(name, "B", delta.B.shape))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return self.rank_of(choice) * (shape.in_features + shape.out_features) + 1

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """LoRA's; and norms and scaled factors once: three per number, one more for A."""
        size = self.rank_of(choice) * (shape.in_features + shape.out_features)
        return (2 * tokens + 3) * size + self.rank_of(choice) * shape.in_features


class DeLoRADelta(Delta):
    """A (r, in), B (out, r) and λ (1,)."""

    def __init__(self, site: Site, rank: int, strength: float) -> None:
        super().__init__(site)
        out, inner, device = site.shape.out_features, site.shape.in_features, site.device
        self.A = nn.Parameter(torch.zeros(rank, inner, device=device))
        self.B = nn.Parameter(torch.zeros(out, rank, device=device))
        self.strength = nn.Parameter(torch.full((1,), float(strength), device=device))
        self.hold("norms", torch.linalg.vector_norm(self.base_weight(), dim=0))

    def low_rank(self) -> Factors:
        lengths = [_length(self.A, 1), _length(self.B, 0)]
        share = self.strength / len(self.A) / (lengths[0] * lengths[1])
        return self.A * self.held("norms", self.A), self.B * share


def _length(t: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(t, dim=dim).clamp_min(1e-4)
