"""Tied-LoRA: trained A and B shared by all layers of a shape, two vectors a layer (2311.09578)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract.delta import Bank, Factors
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    register,
)
from finespun.methods.structures.pieces.pairs import Pairs, PairsDelta, pair_sizes


@register
@dataclass(frozen=True, kw_only=True)
class TiedLoRA(Ranked):
    """ΔW = c·diag(u)·B·diag(v)·A;  u (out,) and v (r,) a site: out + r parameters, and
    A (r, in), B (out, r) once for each distinct shape: r·(in + out) parameters.

    Good for: many layers of one shape: out + r parameters for each.
    Not for: training with per-sample gradients (privacy), as A and B are shared.

    B starts at zero, u and v at one, A is drawn as LoRA's; c = alpha / r.
    Source: arXiv 2311.09578.
    """

    kind = "tied_lora"
    title = "Tied-LoRA"
    source = "arXiv 2311.09578"

    def bank(self, plan: Plan) -> Pairs:
        bank = Pairs(pair_sizes(plan.sites), self.rank)
        for out, inner in bank.sizes:
            A, _ = bank.pair(out, inner)
            A.data.copy_(self.kaiming(f"{out}x{inner}", "A", A.shape))
        return bank

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "TiedLoRADelta":
        return TiedLoRADelta(site, bank, plan.choices[site.shape.name])

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return shape.out_features + self.rank_of(choice)

    def num_shared_parameters(self, plan: Plan) -> int:
        return self.rank * sum(out + inner for out, inner in pair_sizes(plan.sites))

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        products = 2 * self.rank_of(choice) * (shape.in_features + shape.out_features)
        return tokens * (products + self.num_parameters(shape, choice))


class TiedLoRADelta(PairsDelta):
    """u (out,) and v (r,); A and B lie in the bank."""

    def __init__(self, site: Site, bank: Bank | None, choice: Mapping[str, Any]) -> None:
        super().__init__(site, bank, choice["scale"])
        self.u = nn.Parameter(torch.ones(site.shape.out_features, device=site.device))
        self.v = nn.Parameter(torch.ones(choice["rank"], device=site.device))

    def low_rank(self) -> Factors:
        A, B = self.shared()
        return self.v[:, None] * A, self.u[:, None] * B

    def forward(self, x: Tensor) -> Tensor:
        if self.adjusted:
            return super().forward(x)
        A, B = self.shared()
        return F.linear(F.linear(x.to(A.dtype), A) * self.v, B) * (self.u * self.scale)
