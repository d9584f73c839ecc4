"""S2-LoRA: one A and B for all layers, a short sparse vector of ranks for each (2309.11756)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract.delta import Bank, Factors
from finespun.contract.groups import Group
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    register,
)
from finespun.errors import InputError
from finespun.methods.structures.pieces.pairs import Pairs, PairsDelta, pair_sizes


@register
@dataclass(frozen=True, kw_only=True)
class S2LoRA(Ranked):
    """ΔW = c·B·diag(s)·A;  s (r,) a site: r parameters, and A (r, in), B (out, r) shared.

    Good for: many layers of one shape: r parameters each, and ranks that can be pruned.
    Not for: a few layers: the shared pair is then nearly everything.

    `share="shape"` keeps one pair for each distinct (out, in), r·(in + out) parameters each;
    "slice" one pair of the greatest sides, of which a site takes the first rows and columns. s
    starts at zero; A has variance 1/in, B 1/r, both normal. c = alpha / r with alpha = r.

    s is meant to become sparse: its parameters are `rank` groups, whose `shrink` by rate·λ is the
    proximal step of λ·Σ|s|. Compacting
    gives each site a LoRA of its own rank. Source: arXiv 2309.11756.
    """

    rank: int = 32
    share: Literal["shape", "slice"] = "shape"

    kind = "s2_lora"
    title = "S2-LoRA"
    source = "arXiv 2309.11756"
    default_scale = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share not in ("shape", "slice"):
            raise InputError(f"share={self.share!r} is not known; try 'shape' or 'slice'")

    def bank(self, plan: Plan) -> Pairs:
        bank = Pairs(pair_sizes(plan.sites, self.share == "slice"), self.rank)
        for out, inner in bank.sizes:
            for side, own in zip("AB", bank.pair(out, inner)):
                drawn = torch.randn(own.shape, generator=self.generator(f"{out}x{inner}", side))
                own.data.copy_(drawn / own.shape[1] ** 0.5)
        return bank

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "S2LoRADelta":
        return S2LoRADelta(site, bank, plan.choices[site.shape.name])

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return self.rank_of(choice)

    def num_shared_parameters(self, plan: Plan) -> int:
        sizes = pair_sizes(plan.sites, self.share == "slice")
        return self.rank * sum(out + inner for out, inner in sizes)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return tokens * self.rank_of(choice) * (2 * (shape.in_features + shape.out_features) + 1)


class S2LoRADelta(PairsDelta):
    """s (r,); A and B lie in the bank. A `rank` group is one number of s."""

    def __init__(self, site: Site, bank: Bank | None, choice: Mapping[str, Any]) -> None:
        super().__init__(site, bank, choice["scale"])
        self.s = nn.Parameter(torch.zeros(choice["rank"], device=site.device))

    def low_rank(self) -> Factors:
        A, B = self.shared()
        return A, B * self.s

    def forward(self, x: Tensor) -> Tensor:
        if self.adjusted:
            return super().forward(x)
        A, B = self.shared()
        return F.linear(F.linear(x.to(A.dtype), A) * (self.s * self.scale), B)

    def groups(self, kind: str) -> list[Group]:
        if kind != "rank":
            return []
        return [Group("rank", f"rank {i}", (("s", (i,)),)) for i in range(len(self.s))]
