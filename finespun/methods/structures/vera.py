"""VeRA: two trained vectors a layer around frozen random matrices that all share (2310.11454)."""

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
class VeRA(Ranked):
    """ΔW = c·diag(b)·B·diag(d)·A;  b (out,) and d (r,) trained: out + r parameters.

    Good for: out + r parameters a layer, with frozen factors that are never saved.
    Not for: fast steps: frozen factors of a large rank are multiplied by in each.

    A (r, in) and B (out, r) are frozen, uniform on ±√(6/in) and ±√(6/r), drawn once for the widest
    layer of the model and cut to each. d starts at `d_initial`, b at zero; c is 1, or alpha / r
    where alpha is given. Source: arXiv 2310.11454.
    """

    rank: int = 256
    d_initial: float = 0.1

    kind = "vera"
    source = "arXiv 2310.11454"
    default_scale = 1.0
    aliases = {**Ranked.aliases, "vera_dropout": "dropout", "projection_prng_key": "seed"}

    def plan(self, sites: Sequence[Site], scores: Scores | None = None) -> Plan:
        plan = super().plan(sites, scores)
        widest = {
            "in": max((s.in_features for s in plan.sites), default=0),
            "out": max((s.out_features for s in plan.sites), default=0),
        }
        return dataclasses.replace(plan, shared=widest)

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "VeRADelta":
        rank, scale = (plan.choices[site.shape.name][k] for k in ("rank", "scale"))
        A = Frozen("symmetric", self.seed, ("vera", "A"), (rank, plan.shared["in"]))
        B = Frozen("symmetric", self.seed, ("vera", "B"), (plan.shared["out"], rank))
        scale *= 6 / math.sqrt(plan.shared["in"] * rank)
        return VeRADelta(site, A, B, self.d_initial, scale)

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return shape.out_features + self.rank_of(choice)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        products = 2 * self.rank_of(choice) * (shape.in_features + shape.out_features)
        return tokens * (products + self.num_parameters(shape, choice))


class VeRADelta(Delta):
    """b (out,) and d (r,); A and B are read from the shared frozen ones, in [-1, 1), their bounds
    being part of `scale`."""

    def __init__(self, site: Site, A: Frozen, B: Frozen, d: float, scale: float) -> None:
        super().__init__(site)
        self.scale, self.frozen = scale, (A, B)
        self.b = nn.Parameter(torch.zeros(site.shape.out_features, device=site.device))
        self.d = nn.Parameter(torch.full(A.shape[:1], d, device=site.device))

    def projections(self) -> Factors:
        """A (r, in) and B (out, r), frozen."""
        A, B = (frozen.like(self.d) for frozen in self.frozen)
        return A[:, : self.site.shape.in_features], B[: self.site.shape.out_features]

    def low_rank(self) -> Factors:
        A, B = self.projections()
        return self.d[:, None] * A, self.b[:, None] * B

    def product(self, x: Tensor) -> Tensor:
        A, B = self.projections()
        h = F.linear(x.to(A.dtype), A) * self.d
        return F.linear(h, B) * (self.b * self.scale)
