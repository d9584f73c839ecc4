"""MiLoRA: the update starts as the least part of the weight (arXiv 2406.09044)."""

from dataclasses import dataclass

import torch

from finespun.contract import register
from finespun.contract.delta import Factors
from finespun.methods.initializers.pieces.starts import FactorStart, Place

FLOOR = 1e-6  # of the largest singular value: below, both factors would start at a saddle


@register
@dataclass(frozen=True, kw_only=True)
class MiLoRA(FactorStart):
    """A0 = q ∘ V₋ᵣᵀ, B0 = U₋ᵣ ∘ q with q = √(S₋ᵣ / s), the last r of W0 = U S Vᵀ.

    Good for: learning beside what the weight knows, in directions that it hardly uses.
    Not for: the fastest first steps: these directions are small.

    The base is not edited: ΔW = s (B A − B0 A0). The factors are stored: where singular values are
    near zero their directions are rounding, and cannot be found again. Values below 1e-6 of the
    largest are raised to it, as in a pruned weight, so that both factors get a gradient.
    Source: arXiv 2406.09044.
    """

    kind = "milora"
    source = "arXiv 2406.09044"

    def factors(self, place: Place) -> Factors:
        U, S, Vh = torch.linalg.svd(place.weight(), full_matrices=False)
        r, place.seen = place.rank, S
        return place.halves(U[:, -r:], S[-r:].clamp_min(FLOOR * S[0]), Vh[-r:])

    def settle(self, place: Place, pair: Factors, error: float) -> list[str]:
        S = place.seen
        raised = 0 if S is None else int((S[-place.rank :] < FLOOR * S[0]).sum())
        told = f"{place.name!r}: {raised} of {place.rank} least singular values are zero: raised"
        return [told] if raised else []
