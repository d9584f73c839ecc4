"""OLoRA: the update starts as the first directions of the weight's QR (arXiv 2406.01775)."""

from dataclasses import dataclass

import torch

from finespun.contract import register
from finespun.contract.delta import Factors
from finespun.methods.initializers.pieces.starts import FactorStart, Place, large


@register
@dataclass(frozen=True, kw_only=True)
class OLoRA(FactorStart):
    """B0 = Q[:, :r], A0 = R[:r] of W0 = Q R; B0 has orthonormal columns.

    Good for: an orthonormal start without a decomposition into singular values.
    Not for: large scales: s is not divided out, and both start and first step grow with it.

    The base is not edited: ΔW = s (B A − B0 A0). B0 A0 is the projection of W0 on its first r
    columns, so it depends on the order of the input features. `unit` divides A0 by s, so that
    s·B0 A0 is that projection itself. Source: arXiv 2406.01775.
    """

    unit: bool = False

    kind = "olora"
    source = "arXiv 2406.01775"

    def factors(self, place: Place) -> Factors:
        Q, R = torch.linalg.qr(place.weight())
        A = R[: place.rank]
        return A / place.scale if self.unit else A, Q[:, : place.rank]

    def settle(self, place: Place, pair: Factors, error: float) -> list[str]:
        return large(place, pair, most=1.0)
