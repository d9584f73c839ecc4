"""LoftQ: the update starts as what quantisation took from the weight (arXiv 2310.08659)."""

from dataclasses import dataclass

import torch

from finespun.contract import Need, register
from finespun.contract.delta import Factors
from finespun.errors import InputError
from finespun.methods.initializers.pieces.starts import FactorStart, Place


@register
@dataclass(frozen=True, kw_only=True)
class LoftQ(FactorStart):
    """A0 = q ∘ V_rᵀ, B0 = U_r ∘ q, q = √(S_r / s), of W − Q = U S Vᵀ, Q the quantised base.

    Good for: a base of few bits that begins nearer to the model it was made from.
    Not for: a base that is not quantised: there W = Q.

    `weights` names the folder, or the safetensors file, of the model before it was quantised. The
    model is meant to move: W ≈ Q + s·B0 A0, and nothing is taken away again; ‖W − Q − s·B0 A0‖ is
    the tail of the spectrum. One step (T = 1): the base that stands is kept, and s is divided out.
    Source: arXiv 2310.08659.
    """

    weights: str = ""

    kind = "loftq"
    source = "arXiv 2310.08659"
    needs = frozenset({Need.WEIGHTS})

    @property
    def folder(self) -> str:
        return self.weights

    @property
    def moves(self) -> bool:
        return True

    def factors(self, place: Place) -> Factors:
        W = place.check(place.measured.weight(place.name), "weights")
        lost, r = W - place.weight(), place.rank
        if float(lost.norm()) <= 1e-6 * float(W.norm()):
            raise InputError(
                f"loftq: the base at {place.name!r} is {self.weights!r} itself, nothing was lost; "
                "load the model quantised, or take pissa"
            )
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        return place.halves(U[:, :r], S[:r], Vh[:r])
