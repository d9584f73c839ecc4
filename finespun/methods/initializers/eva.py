"""EVA: A starts as the main directions of what the layer reads (arXiv 2410.07170)."""

from dataclasses import dataclass

import torch

from finespun.contract import Need, register
from finespun.contract.delta import Factors
from finespun.methods.initializers.pieces.starts import FactorStart, Place


@register
@dataclass(frozen=True, kw_only=True)
class EVA(FactorStart):
    """A0 = the r main eigenvectors of C = E[x xᵀ], as rows; B0 = 0.

    Good for: an update that reads what varies most in its inputs, at no cost in training.
    Not for: structures without an A of their own.

    C is over the tokens that are trained, or not padding. It is not centred: a mean that all
    inputs share carries gradient too; `center` takes it away, as PEFT does. Every layer keeps its
    rank; PEFT's `rho`, which moves ranks between layers, is not here.
    Source: arXiv 2410.07170.
    """

    center: bool = False

    kind = "eva"
    source = "arXiv 2410.07170"

    @property
    def needs(self) -> frozenset[Need]:
        means = {Need.MEANS} if self.center else set()
        return frozenset({Need.COVARIANCE, Need.SIDES, *means})

    def factors(self, place: Place) -> Factors:
        C = place.covariance()
        if self.center:
            mean = place.check(place.measured.mean(place.name), "mean input")
            C = C - torch.outer(mean, mean)
        A = torch.linalg.eigh(C.double())[1][:, -place.rank :].flip(1).mT.to(C.dtype)
        return A, C.new_zeros(place.delta.site.shape.out_features, place.rank)
