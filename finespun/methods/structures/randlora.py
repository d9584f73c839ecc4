"""RandLoRA: a full-rank sum of frozen random low-rank products, scaled by trained diagonals."""

import dataclasses
import math
from collections.abc import Sequence
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
    Scores,
    register,
)
from finespun.methods.structures.pieces.frozen import Frozen


@register
@dataclass(frozen=True, kw_only=True)
class RandLoRA(Ranked):
    """ΔW = c·Σ_j B_j·diag(λ_j)·A·diag(γ_j), j = 1..n, n = ⌈m/r⌉ for m = min(in, out).

    Good for: updates of full rank at LoRA's parameters.
    Not for: cheap steps: the sum costs as much as a dense layer.

    λ_j (r,) and γ_j (m,) trained: n·(r + m) parameters. A (r, m) and B_j (M, r), M = max(in, out),
    are frozen, uniform of variance 1, drawn once for the greatest sides of the model and cut to
    each site; where in > out the sum is transposed. λ starts at zero, γ at 1/max(n, m); c = alpha /
    r with alpha = 20·r. Source: arXiv 2502.00987.
    """

    rank: int = 32

    kind = "randlora"
    sizes = ()
    source = "arXiv 2502.00987"
    default_scale = 20.0
    aliases = {
        **Ranked.aliases,
        "randlora_alpha": "alpha",
        "randlora_dropout": "dropout",
        "projection_prng_key": "seed",
    }

    def plan(self, sites: Sequence[Site], scores: Scores | None = None) -> Plan:
        plan = super().plan(sites, scores)
        sides = [sorted((s.in_features, s.out_features)) for s in plan.sites]
        widest = {name: max((s[i] for s in sides), default=0) for i, name in enumerate(("m", "M"))}
        return dataclasses.replace(plan, shared=widest)

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "RandLoRADelta":
        rank, scale = (plan.choices[site.shape.name][k] for k in ("rank", "scale"))
        m, M = plan.shared["m"], plan.shared["M"]
        A = Frozen("symmetric", self.seed, ("randlora", "A"), (rank, m))
        B = Frozen("symmetric", self.seed, ("randlora", "B"), (M, -(-m // rank) * rank))
        return RandLoRADelta(site, A, B, 3 * scale)

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        m = min(shape.in_features, shape.out_features)
        return -(-m // self.rank_of(choice)) * (self.rank_of(choice) + m)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """The two products of every row, or forming ΔW once and one dense product."""
        n_in, n_out = shape.in_features, shape.out_features
        m = min(n_in, n_out)
        full = -(-m // self.rank_of(choice)) * self.rank_of(choice)
        by_factors, dense = tokens * full * (n_in + n_out), (full + tokens) * n_in * n_out
        return 2 * (full * m + min(by_factors, dense))


class RandLoRADelta(Delta):
    """lambda_ (r, n) and gamma (n, m). Term (ρ, j) of the sum is row ρ of A, scaled by λ_jρ and
    γ_j, times column ρ·n + j of B; A and B are read from the frozen ones, in [-1, 1)."""

    def __init__(self, site: Site, A: Frozen, B: Frozen, scale: float) -> None:
        super().__init__(site)
        self.scale, self.frozen = scale, (A, B)
        rank, sides = A.shape[0], (site.shape.in_features, site.shape.out_features)
        m, n = min(sides), -(-min(sides) // rank)
        self.lambda_ = nn.Parameter(torch.zeros(rank, n, device=site.device))
        self.gamma = nn.Parameter(torch.full((n, m), 1 / max(n, m), device=site.device))

    def low_rank(self) -> Factors:
        """Rank n·r, at least min(in, out)."""
        frozen_A, frozen_B = (f.like(self.gamma) for f in self.frozen)
        (rank, n), (_, m) = self.lambda_.shape, self.gamma.shape
        shape = self.site.shape
        M = max(shape.in_features, shape.out_features)
        small = (self.lambda_[:, :, None] * frozen_A[:, None, :m] * self.gamma).flatten(0, 1)
        large = frozen_B[:M, : n * rank]
        return (small, large) if m == shape.in_features else (large.mT, small.mT)

    def forward(self, x: Tensor) -> Tensor:
        if not self.direct(math.prod(x.shape[:-1]), False):
            return super().forward(x)
        A, B = self.low_rank()
        return F.linear(x.to(A.dtype), (B * self.scale) @ A)

    def direct(self, tokens: int, formed: bool) -> bool:
        """Whether forming ΔW, then one product, is cheaper than two products with factors."""
        if self.adjusted:
            return False
        shape, full = self.site.shape, self.lambda_.numel()
        n_in, n_out = shape.in_features, shape.out_features
        return (full + tokens) * n_in * n_out < tokens * full * (n_in + n_out)
