"""CorDA: parts of the weight chosen by what the layer reads (arXiv 2406.05223)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finespun.contract import Need, register
from finespun.contract.delta import Factors
from finespun.contract.structure import must_be_one_of, must_be_positive
from finespun.methods.initializers.pieces.starts import FactorStart, Place

MODES = ("ipm", "kpm")
INVERTED = 0.05  # the most of ‖C C⁻¹ − I‖
TRIES = 20


@register
@dataclass(frozen=True, kw_only=True)
class CorDA(FactorStart):
    """A0 = q ∘ V[k]ᵀ, B0 = U[k] ∘ q of U S V̂ᵀ = W0 C, V = C⁻¹ V̂, q = √(S[k] / s), C = E[x xᵀ].

    Good for: training what the rows at hand use ("ipm"), or what they do not ("kpm").
    Not for: fewer rows than the layer has inputs: the damping then decides.

    k are the first r ("ipm": look at rows of the task) or the last r ("kpm": look at rows of the
    knowledge to keep). C is over the tokens that are trained, or not padding; its size does not
    matter. damp · mean(diag C) is added to the diagonal, doubled until C can be inverted.
    ΔW = s (B A − B0 A0): the base is not edited. Source: arXiv 2406.05223.
    """

    mode: Literal["ipm", "kpm"] = "ipm"
    damp: float = 0.01

    kind = "corda"
    title = "CorDA"
    source = "arXiv 2406.05223"
    needs = frozenset({Need.COVARIANCE})

    def __post_init__(self) -> None:
        super().__post_init__()
        must_be_one_of("mode", self.mode, MODES)
        must_be_positive(damp=(self.damp, 0.01))

    def factors(self, place: Place) -> Factors:
        W, (C, inverse) = place.weight().double(), self.damped(place.covariance().double())
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        k = slice(0, place.rank) if self.mode == "ipm" else slice(-place.rank, None)
        A, B = place.halves(U[:, k], S[k], Vh[k] @ inverse)
        return A.to(place.weight().dtype), B.to(place.weight().dtype)

    def damped(self, C: Tensor) -> tuple[Tensor, Tensor]:
        """C with as much on its diagonal as inverting it takes, and its inverse."""
        eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
        size, damp = C.diagonal().mean().clamp_min(torch.finfo(C.dtype).tiny), self.damp
        for _ in range(TRIES):
            damped = C + damp * size * eye
            inverse = torch.linalg.inv(damped)
            if float((damped @ inverse - eye).norm()) < INVERTED:
                break
            damp *= 2
        return damped, inverse
