"""LSR-Adapt: the two LoRA factors as short sums of Kronecker products (arXiv 2502.13568)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.errors import InputError
from finespun.kernels.kron import (
    kron_apply,
    kron_macs,
    kron_sum,
    kron_sum3,
    kron_sum_many,
)
from finespun.linalg import (
    LowRank,
    choose_factors,
    choose_factors3,
    condition,
    nearest_separable,
    rebalance,
)
from finespun.structures.delta import Bank, Delta, Factors
from finespun.structures.groups import Group
from finespun.structures.site import Site, SiteShape
from finespun.structures.structure import Plan, Ranked, register

STARTS = ("balanced", "matched", "frames", "official")
PATHS = ("auto", "formed", "factorised")
SIDES = ("A", "B")


@register
@dataclass(frozen=True, kw_only=True)
class LSR(Ranked):
    """ΔW = c·B·A,  A = Σ_k A1_k ⊗ A2_k (r, in),  B = Σ_k B1_k ⊗ B2_k (out, r),  k = 1..s.

    Good for: a fraction of LoRA's numbers, exported as an exact LoRA all the same.
    Not for: faster steps: formed, it costs what a LoRA of its rank costs.

    With r = r1·r2, in ≤ p1·p2 and out ≤ q1·q2, the factors are A1 (s, r1, p1), A2 (s, r2, p2),
    B1 (s, q1, r1), B2 (s, q2, r2): s·(r1 p1 + r2 p2 + r1 q1 + r2 q2) numbers, 3,584 for 768x768
    at r = 4, s = 16. Sides are zero-padded only where exact factors would cost over 10 % more.

    `separation_rank` is s. `rank_split` fixes (r1, r2), else the cheapest is chosen; three numbers
    give a third factor. `start`: "balanced" (A has LoRA's variance, the last factor of B is zero),
    "matched" (first steps equal LoRA's), "frames" (orthonormal frames) or "official" (the paper's
    code: all numbers 0.01·N(0, 1), alpha = 8192·r1; does not start at the base). `path` forces how
    the update is multiplied: by A and B formed first, or factor by factor.
    Source: arXiv 2502.13568; factor algebra: Van Loan & Pitsianis 1993.
    """

    rank: int = 4
    separation_rank: int = 16
    rank_split: tuple[int, ...] | None = None
    start: Literal["balanced", "matched", "frames", "official"] = "balanced"
    path: Literal["auto", "formed", "factorised"] = "auto"

    kind = "lsr"
    source = "arXiv 2502.13568"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separation_rank < 1:
            raise InputError(f"separation_rank={self.separation_rank} must be at least 1; try 16")
        for name, known in (("start", STARTS), ("path", PATHS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        root, split = math.isqrt(self.rank), self.rank_split
        if split is not None and (
            len(split) not in (2, 3) or min(split) < 1 or math.prod(split) != self.rank
        ):
            raise InputError(
                f"rank_split={split} must be two or three numbers whose product is "
                f"rank={self.rank}; try (1, {self.rank})"
            )
        if self.start == "official" and (
            root * root != self.rank or split not in (None, (root,) * 2)
        ):
            raise InputError(
                f"the official start needs a square rank split evenly, not rank={self.rank} "
                f"with rank_split={split}; try rank={root * root}"
            )
        if split is not None and len(split) == 3 and self.path == "factorised":
            raise InputError("three factors have no factorised path; try path='formed'")

    @property
    def starts_at_zero(self) -> bool:
        return self.start != "official"

    @property
    def scale(self) -> float:
        if self.start == "official" and self.alpha is None:
            return 8192.0 / math.isqrt(self.rank)
        return super().scale

    def split(self, n_in: int, n_out: int) -> tuple[list[int], list[int], list[int]]:
        """The cheapest (ranks, input sizes, output sizes): ranks multiply to `rank`, sizes to at
        least `n_in` and `n_out`."""
        if self.rank_split is not None and len(self.rank_split) == 3:
            three = [
                choose_factors3(self.rank, n, rank_split=self.rank_split) for n in (n_in, n_out)
            ]
            sizes = [[f.p1, f.p2, f.p3] for f in three]
            return list(self.rank_split), sizes[0], sizes[1]
        found = []
        for r1, r2 in self.rank_splits():
            down = choose_factors(self.rank, n_in, rank_split=(r1, r2))
            up = choose_factors(self.rank, n_out, rank_split=(r1, r2))
            cost = r1 * (down.p1 + up.p1) + r2 * (down.p2 + up.p2)
            found.append((cost, max(r1, r2), [r1, r2], [down.p1, down.p2], [up.p1, up.p2]))
        return min(found)[2:]

    def rank_splits(self) -> list[tuple[int, ...]]:
        """The (r1, r2) that may be chosen from."""
        if self.rank_split is not None:
            return [self.rank_split]
        if self.start == "official":
            return [(math.isqrt(self.rank),) * 2]
        if self.path == "factorised":
            return [(1, self.rank)]
        return [(i, self.rank // i) for i in range(1, self.rank + 1) if self.rank % i == 0]

    def choose(self, site: Site) -> dict[str, Any]:
        shape = site.shape
        ranks, down, up = self.split(shape.in_features, shape.out_features)
        terms = [self.separation_rank, self.separation_rank]
        return {**super().choose(site), "ranks": ranks, "down": down, "up": up, "terms": terms}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "LSRDelta":
        delta = LSRDelta(site, plan.choices[site.shape.name], self.path)
        draw_start(delta, self)
        return delta

    def form(self, deltas: Sequence[Delta]) -> list[Factors]:
        lsr = [d for d in deltas if isinstance(d, LSRDelta)]
        if any(d.count == 3 for d in lsr):
            return [d.low_rank() for d in lsr]
        formed = kron_sum_many([d.pair(s) for d in lsr for s in SIDES])
        return [d.trim(A, B) for d, A, B in zip(lsr, formed[::2], formed[1::2])]

    def numbers(self, shape: SiteShape) -> int:
        ranks, down, up = self.split(shape.in_features, shape.out_features)
        return self.separation_rank * sum(r * (p + q) for r, p, q in zip(ranks, down, up))

    def flops(self, shape: SiteShape, tokens: int = 1) -> int:
        """Forming A and B once, then two products per row; or the factorised products alone where
        these are fewer."""
        ranks, p, q = self.split(shape.in_features, shape.out_features)
        size, s = shape.in_features + shape.out_features, self.separation_rank
        formed = (s + tokens) * self.rank * size
        if len(ranks) == 3:
            return 2 * formed
        factorised = tokens * (fewest_macs(s, ranks, p) + fewest_macs(s, q, ranks))
        ways = {"formed": formed, "factorised": factorised, "auto": min(formed, factorised)}
        return 2 * ways[self.path]


def fewest_macs(s: int, rows: Sequence[int], columns: Sequence[int]) -> int:
    """Multiply-adds a row of x for Σ_k P_k ⊗ Q_k, factor by factor in the better order."""
    (a, b), (i, j) = rows, columns
    return min(kron_macs(s, a, b, i, j, "first"), kron_macs(s, a, b, i, j, "second"))


class LSRDelta(Delta):
    """The factors A1, A2 (and A3), B1, B2 (and B3) of one site, each (terms, rows, columns).

    A `term` group is one Kronecker term of A or of B; switching it off stays in the form.
    """

    def __init__(self, site: Site, choice: Mapping[str, Any], path: str) -> None:
        super().__init__(site)
        self.scale, self.path, self.choice = choice["scale"], path, choice
        ranks, self.count = choice["ranks"], len(choice["ranks"])
        for t, (r, p, q) in enumerate(zip(ranks, choice["down"], choice["up"]), start=1):
            down, up = (choice["terms"][0], r, p), (choice["terms"][1], q, r)
            self.register_parameter(f"A{t}", nn.Parameter(torch.zeros(down, device=site.device)))
            self.register_parameter(f"B{t}", nn.Parameter(torch.zeros(up, device=site.device)))

    def side(self, name: str) -> tuple[Tensor, ...]:
        """The Kronecker factors of "A" or "B"."""
        return tuple(getattr(self, f"{name}{t}") for t in range(1, self.count + 1))

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """The two factors of a side that has two."""
        first, second = self.side(name)
        return first, second

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
        (sA, sB), ranks = self.choice["terms"], self.choice["ranks"]
        p, q = self.choice["down"], self.choice["up"]
        shape = self.site.shape
        per_row = fewest_macs(sA, ranks, p) + fewest_macs(sB, q, ranks)
        as_lora = math.prod(ranks) * (shape.in_features + shape.out_features)
        forming = 0 if formed else max(sA, sB) * as_lora
        cheaper: bool = tokens * per_row < forming + tokens * as_lora
        return cheaper

    def groups(self, kind: str) -> list[Group]:
        if kind != "term":
            return []
        return [
            Group("term", f"{s} term {k}", tuple((f"{s}{t + 1}", (k,)) for t in range(self.count)))
            for s, terms in zip(SIDES, self.choice["terms"])
            for k in range(terms)
        ]

    def compact(self) -> tuple["LSRDelta", dict[str, Any]] | None:
        if self.adjusted:
            return None
        masks, kept = self.masks(), {}
        for s, terms in zip(SIDES, self.choice["terms"]):
            mask = masks.get(f"{s}1")
            alive = (
                torch.ones(terms, dtype=torch.bool)
                if mask is None
                else mask.flatten(1).any(1).cpu()
            )
            alive[0] |= not alive.any()
            kept[s] = alive
        choice = {**self.choice, "terms": [int(kept[s].sum()) for s in SIDES]}
        small = LSRDelta(self.site, choice, self.path)
        for s in SIDES:
            for new, old in zip(small.side(s), self.side(s)):
                new.data.copy_(old.detach()[kept[s].to(old.device)])
        return small, choice

    def diagnostics(self) -> dict[str, float]:
        """κ = √(Σ_k ‖A1_k‖²‖A2_k‖²) / ‖A‖ for A and B: rounding error grows as κ·ε."""
        if self.count == 3:
            return {}
        return {f"condition_{s}": float(condition(*self.pair(s)).detach()) for s in SIDES}

    def rebalance(self) -> None:
        """Write the same A and B with κ = 1: terms become orthogonal and factors equally large.
        Optimiser moments of these numbers lose their meaning; two factors only."""
        if self.count == 3:
            raise InputError("three Kronecker factors have no balanced form; use two")
        with torch.no_grad():
            for s in SIDES:
                for old, new in zip(self.side(s), rebalance(*self.pair(s))):
                    old.copy_(new)

    def project(self, update: LowRank, refine: int = 0) -> float:
        """Become the nearest LSR of another update, scale included (`nearest_separable`), and
        return the relative error ‖ΔW_lsr − ΔW‖/‖ΔW‖."""
        if self.count == 3:
            raise InputError("three Kronecker factors have no best approximation; use two")
        c = self.choice
        best = nearest_separable(
            update * (1 / self.scale), c["ranks"], c["down"], c["up"], c["terms"], refine
        )
        with torch.no_grad():
            for side, pair in (("A", best.A), ("B", best.B)):
                for own, new in zip(self.side(side), pair):
                    own.copy_(new)
        return best.error


def draw_start(delta: LSRDelta, structure: LSR) -> None:
    """Fill the factors for `structure.start`; all but "official" leave B's last factor at zero.

    balanced: normal with s·∏σ_t² = 1/(3·in), so entries of A have LoRA's variance;
    matched: first factors N(0, 1/s), the others of A uniform with variance 1/(3·in);
    frames: as matched, with orthogonal first frames; official: 0.01·N(0, 1) everywhere.
    """
    name, n = delta.site.shape.name, delta.site.shape.in_features
    terms, d = structure.separation_rank, delta.count
    balanced = (3 * n * terms) ** (-1 / (2 * d))
    for s in SIDES:
        for t, factor in enumerate(delta.side(s), start=1):
            g = structure.generator(name, f"{s}{t}")
            normal = torch.randn(factor.shape, generator=g)
            if structure.start == "official":
                drawn = 0.01 * normal
            elif s == "B" and t == d:
                continue
            elif structure.start == "balanced":
                drawn = balanced * normal
            elif t == 1 and structure.start == "frames":
                drawn = _frame(normal.flatten(1)).view_as(normal)
            elif t == 1:
                drawn = normal / math.sqrt(terms)
            else:
                uniform = 2 * torch.rand(factor.shape, generator=g) - 1
                drawn = uniform * math.sqrt(3) * (3 * n) ** (-1 / (2 * (d - 1)))
            factor.data.copy_(drawn)


def _frame(rows: Tensor) -> Tensor:
    """Orthogonal rows (columns where there are more rows) with entries of variance 1/s."""
    q = torch.linalg.qr(rows.T if rows.shape[0] <= rows.shape[1] else rows)[0]
    frame = q.T if rows.shape[0] <= rows.shape[1] else q
    return frame * math.sqrt(max(rows.shape) / rows.shape[0])
