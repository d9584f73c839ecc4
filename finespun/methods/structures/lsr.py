"""LSR-Adapt: the two LoRA factors as short sums of Kronecker products (arXiv 2502.13568)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from finespun.contract.delta import Bank, Delta, Factors
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    must_be_one_of,
    register,
)
from finespun.errors import InputError
from finespun.kernels.kron import kron_apply, kron_macs, kron_sum, kron_sum3, kron_sum_many
from finespun.linalg import choose_sides
from finespun.methods.structures.pieces.terms import SIDES, Terms, draw

STARTS = ("balanced", "matched", "frames", "official")
PATHS = ("auto", "formed", "factorised")


@register
@dataclass(frozen=True, kw_only=True)
class LSR(Ranked):
    """ΔW = c·B·A,  A = Σ_k A1_k ⊗ A2_k (r, in),  B = Σ_k B1_k ⊗ B2_k (out, r),  k = 1..s.

    Good for: a fraction of LoRA's parameters, exported as an exact LoRA all the same.
    Not for: faster steps: formed, it costs what a LoRA of its rank costs.

    With r = r1·r2, in ≤ p1·p2 and out ≤ q1·q2, the factors are A1 (s, r1, p1), A2 (s, r2, p2),
    B1 (s, q1, r1), B2 (s, q2, r2): s·(r1 p1 + r2 p2 + r1 q1 + r2 q2) parameters, 3,584 for 768x768
    at r = 4, s = 16. Sides are zero-padded only where exact factors would cost over 10 % more.

    `separation_rank` is s. `rank_split` fixes (r1, r2), else the cheapest is chosen; three numbers
    give a third factor. `start`: "balanced" (A has LoRA's variance, the last factor of B is zero),
    "matched" (first steps equal LoRA's), "frames" (orthonormal frames) or "official" (the paper's
    code: all parameters 0.01·N(0, 1), alpha = 8192·r1; does not start at the base). `path` forces
    how the update is multiplied: by A and B formed first, or factor by factor.
    Source: arXiv 2502.13568; factor algebra: Van Loan & Pitsianis 1993.
    """

    rank: int = 4
    separation_rank: int = 16
    rank_split: tuple[int, ...] | None = None
    start: Literal["balanced", "matched", "frames", "official"] = "balanced"
    path: Literal["auto", "formed", "factorised"] = "auto"

    kind = "lsr"
    title = "LSR-Adapt"
    sizes = ("rank", "separation_rank")
    default_lr = 3e-3
    source = "arXiv 2502.13568"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separation_rank < 1:
            raise InputError(f"separation_rank={self.separation_rank} must be at least 1; try 16")
        must_be_one_of("start", self.start, STARTS)
        must_be_one_of("path", self.path, PATHS)
        root, split = math.isqrt(self.rank), self.rank_split
        if split and (len(split) not in (2, 3) or min(split) < 1 or math.prod(split) != self.rank):
            raise InputError(
                f"rank_split={split} must be two or three numbers whose product is "
                f"rank={self.rank}; try (1, {self.rank})"
            )
        if self.start == "official" and (root**2 != self.rank or split not in (None, (root, root))):
            raise InputError(
                f"the official start needs a square rank split evenly, not rank={self.rank} "
                f"with rank_split={split}; try rank={root * root}"
            )
        if split and len(split) == 3 and self.path == "factorised":
            raise InputError("three factors have no factorised path; try path='formed'")

    @property
    def starts_at_zero(self) -> bool:
        return self.start != "official"

    @property
    def scale(self) -> float:
        if self.start == "official" and self.alpha is None:
            return 8192.0 / math.isqrt(self.rank)
        return super().scale

    def split(self, shape: SiteShape) -> tuple[list[int], list[int], list[int]]:
        """The cheapest (ranks, input sizes, output sizes): ranks multiply to `rank`, sizes to at
        least those of the layer."""
        splits = [self.rank_split] if self.rank_split else []
        if self.start == "official":
            splits = [(math.isqrt(self.rank),) * 2]
        elif self.path == "factorised" and not splits:
            splits = [(1, self.rank)]
        ranks, down, up = choose_sides(self.rank, shape.in_features, shape.out_features, splits)
        if self.start == "official":  # the paper's code has the larger side first
            down, up = sorted(down, reverse=True), sorted(up, reverse=True)
        return ranks, down, up

    def choose(self, site: Site) -> dict[str, Any]:
        ranks, down, up = self.split(site.shape)
        terms = [self.separation_rank, self.separation_rank]
        return {**super().choose(site), "ranks": ranks, "down": down, "up": up, "terms": terms}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "LSRDelta":
        delta, shape = LSRDelta(site, plan.choices[site.shape.name], self.path), site.shape
        for name, factor in delta.named_parameters() if self.draws else ():
            if self.start == "official" or name != f"B{delta.count}":
                g, t = self.generator(shape.name, name), int(name[1:])
                factor.data.copy_(draw(self.start, factor, t, delta.count, shape.in_features, g))
        return delta

    def form(self, deltas: Sequence[Delta]) -> list[Factors]:
        lsr = [d for d in deltas if isinstance(d, LSRDelta)]
        if any(d.count == 3 for d in lsr):
            return [d.low_rank() for d in lsr]
        formed = kron_sum_many([d.pair(s) for d in lsr for s in SIDES])
        return [d.trim(A, B) for d, A, B in zip(lsr, formed[::2], formed[1::2])]

    def sizes_of(self, shape: SiteShape, choice: Choice) -> tuple[Any, Any, Any, Any]:
        """Ranks, input sizes, output sizes and terms of A and B, by a plan's choice or its own."""
        if "terms" in choice:
            return tuple(choice[name] for name in ("ranks", "down", "up", "terms"))
        return *self.split(shape), [self.separation_rank] * 2

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        ranks, down, up, (a, b) = self.sizes_of(shape, choice)
        return int(sum(r * (a * p + b * q) for r, p, q in zip(ranks, down, up)))

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """Forming A and B once, then two products per row; or the factorised products alone where
        these are fewer."""
        ranks, p, q, (a, b) = self.sizes_of(shape, choice)
        n_in, n_out, rank = shape.in_features, shape.out_features, math.prod(ranks)
        formed = rank * ((a + tokens) * n_in + (b + tokens) * n_out)
        if len(ranks) == 3:
            return int(2 * formed)
        factorised = tokens * (macs(a, ranks, p) + macs(b, q, ranks))
        ways = {"formed": formed, "factorised": factorised, "auto": min(formed, factorised)}
        return int(2 * ways[self.path])


class LSRDelta(Terms):
    """The factors A1, A2 (and A3), B1, B2 (and B3) of one site, each (terms, rows, columns)."""

    def trim(self, A: Tensor, B: Tensor) -> Factors:
        """Drop the zero padding: A (r, in), B (out, r)."""
        shape = self.site.shape
        return A[:, : shape.in_features], B[: shape.out_features]

    def low_rank(self) -> Factors:
        add_up = kron_sum if self.count == 2 else kron_sum3
        return self.trim(*(add_up(*self.side(s)) for s in SIDES))

    def forward(self, x: Tensor) -> Tensor:
        if self.count == 3 or self.path == "formed" or self.adjusted:
            return super().forward(x)
        A, B = self.side("A"), self.side("B")
        shape = self.site.shape
        x = x.to(A[0].dtype)
        padding = A[0].shape[-1] * A[1].shape[-1] - shape.in_features
        h = kron_apply(A[0], A[1], F.pad(x, (0, padding)) if padding else x)
        return kron_apply(B[0], B[1], h)[..., : shape.out_features] * self.scale

    def direct(self, tokens: int, formed: bool) -> bool:
        if self.count == 3 or self.path == "formed" or self.adjusted:
            return False
        if self.path == "factorised":
            return True
        (sA, sB), ranks, shape = self.choice["terms"], self.choice["ranks"], self.site.shape
        per_row = macs(sA, ranks, self.choice["down"]) + macs(sB, self.choice["up"], ranks)
        as_lora = math.prod(ranks) * (shape.in_features + shape.out_features)
        cheaper: bool = tokens * per_row < (tokens + (0 if formed else max(sA, sB))) * as_lora
        return cheaper


def macs(s: int, rows: Sequence[int], columns: Sequence[int]) -> int:
    """Multiply-adds a row of x for Σ_k P_k ⊗ Q_k, factor by factor in the better order."""
    (a, b), (i, j) = rows, columns
    return kron_macs(s, a, b, i, j)
