"""PiSSA: the update starts as the main part of the weight (arXiv 2404.02948)."""

from dataclasses import dataclass

import torch

from finespun.contract import register
from finespun.contract.delta import Factors
from finespun.errors import InputError
from finespun.linalg import randomized_svd_of
from finespun.methods.initializers.pieces.starts import FactorStart, Place


@register
@dataclass(frozen=True, kw_only=True)
class PiSSA(FactorStart):
    """A0 = q ∘ V_rᵀ, B0 = U_r ∘ q, q = √(S_r / s), of W0 = U S Vᵀ: s·B0 A0 is its best of rank r.

    Good for: learning in the directions that the weight uses most.
    Not for: small changes that must stay out of these.

    The base is not edited: ΔW = s (B A − B0 A0), zero at the start. `niter` takes a randomised SVD
    with so many power steps in place of a full one. The first step is proportional to s.
    Source: arXiv 2404.02948.
    """

    niter: int | None = None

    kind = "pissa"
    source = "arXiv 2404.02948"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.niter is not None and self.niter < 0:
            raise InputError(f"niter={self.niter} must not be negative; try 4")

    def factors(self, place: Place) -> Factors:
        W, r = place.weight(), place.rank
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, Vh = randomized_svd_of(W, r, power=self.niter, seed=place.seed)
        return place.halves(U[:, :r], S[:r], Vh[:r])
