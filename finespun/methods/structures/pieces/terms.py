"""Two factors A and B as sums of Kronecker terms: what can be done with the terms."""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from finespun.contract.delta import Delta
from finespun.contract.groups import Group
from finespun.contract.products import Product
from finespun.contract.site import Site
from finespun.errors import InputError
from finespun.linalg import (
    LowRank,
    condition,
    nearest_separable,
    nearest_sides,
    predicted_error,
    rebalance,
)

SIDES = ("A", "B")


class Terms(Delta):
    """A = Σ_k A1_k ⊗ A2_k (⊗ A3_k) and B likewise, `count` factors each (terms, rows, columns).

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

    def products(self) -> list[Product]:
        """R(A) = F1ᵀ F2 and R(B), zero padding included; [] for three factors."""
        if self.count == 3 or self.dead:
            return []

        def rows(name: str) -> Tensor:
            factor: Tensor = getattr(self, name)
            return factor.view(len(factor), -1)

        return [
            Product.of(lambda s=s: rows(f"{s}1").mT, lambda s=s: rows(f"{s}2"))  # type: ignore[misc]
            for s in SIDES
        ]

    def groups(self, kind: str) -> list[Group]:
        if kind != "term":
            return []
        return [
            Group("term", f"{s} term {k}", tuple((f"{s}{t + 1}", (k,)) for t in range(self.count)))
            for s, terms in zip(SIDES, self.choice["terms"])
            for k in range(terms)
        ]

    def compact(self) -> tuple[Self, dict[str, Any]] | None:
        if self.adjusted:
            return None
        masks, kept = self.masks(), {}
        for s, terms in zip(SIDES, self.choice["terms"]):
            mask = masks.get(f"{s}1", torch.ones(terms, 1))
            alive = mask.flatten(1).any(1).cpu()
            alive[0] |= not alive.any()
            kept[s] = alive
        choice = {**self.choice, "terms": [int(kept[s].sum()) for s in SIDES]}
        small = type(self)(self.site, choice, self.path)
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
        Optimiser moments of these parameters lose their meaning; two factors only."""
        if self.count == 3:
            raise InputError("three Kronecker factors have no balanced form; use two")
        with torch.no_grad():
            for s in SIDES:
                for old, new in zip(self.side(s), rebalance(*self.pair(s))):
                    old.copy_(new)

    def assign(
        self, update: LowRank | Tensor, covariance: Tensor | None = None, refine: int = 0
    ) -> float:
        """The nearest Kronecker sums of balanced factors; under a covariance, and where something
        stands between, least squares from there."""
        if self.count == 3 or self.adjusted or self.masks():
            return super().assign(update, covariance)
        whole = LowRank.from_dense(update) if isinstance(update, Tensor) else update
        error = self.project(whole, refine)
        return error if covariance is None else super().assign(update, covariance)

    @torch.no_grad()
    def take_factors(self, A: Tensor, B: Tensor, apart: bool = False, refine: int = 0) -> float:
        """The Kronecker sums nearest to the two sides, rotations of the rank left free; of B = 0
        the last factor becomes zero and the others stay."""
        c = self.choice
        if self.count == 3 or self.adjusted or self.masks() or len(A) != math.prod(c["ranks"]):
            return super().take_factors(A, B, apart, refine)
        shape = c["ranks"], c["down"], c["up"], c["terms"]
        best = nearest_sides(A, B, *shape, apart=apart, refine=0 if apart else refine)
        for own, new in zip(self.side("A"), best.A):
            own.copy_(new)
        if not bool(B.any()):
            self.side("B")[-1].zero_()
            return 0.0
        for own, new in zip(self.side("B"), best.B):
            own.copy_(new)
        return best.error

    def predicted(self, update: LowRank) -> float | None:
        if self.count == 3:
            return None
        c = self.choice
        return predicted_error(update, c["ranks"], c["down"], c["up"], c["terms"])

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


def draw(
    start: str, factor: Tensor, t: int, count: int, n_in: int, generator: torch.Generator
) -> Tensor:
    """Parameters for factor t of `count` factors of a side, (terms, rows, columns), by `start`.

    balanced: normal with s·∏σ_t² = 1/(3·in), so entries of A have LoRA's variance;
    matched: first factors N(0, 1/s), the others uniform so that A has the variance 1/(3·in);
    frames: as matched, with orthogonal first frames; official: 0.01·N(0, 1).
    """
    terms, normal = len(factor), torch.randn(factor.shape, generator=generator)
    if start == "official":
        return 0.01 * normal
    if start == "balanced":
        return normal * (3 * n_in * terms) ** (-1 / (2 * count))
    if t == 1 and start == "frames":
        return _frame(normal.flatten(1)).view_as(normal)
    if t == 1:
        return normal / math.sqrt(terms)
    uniform = 2 * torch.rand(factor.shape, generator=generator) - 1
    return uniform * math.sqrt(3) * (3 * n_in) ** (-1 / (2 * (count - 1)))


def _frame(rows: Tensor) -> Tensor:
    """Orthogonal rows (columns where there are more rows) with entries of variance 1/s."""
    q = torch.linalg.qr(rows.T if rows.shape[0] <= rows.shape[1] else rows)[0]
    frame = q.T if rows.shape[0] <= rows.shape[1] else q
    return frame * math.sqrt(max(rows.shape) / rows.shape[0])
