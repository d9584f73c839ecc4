"""Orthogonal start: A0 and B0 take alternate rows of one orthogonal matrix, so that B0 A0 = 0."""

from dataclasses import dataclass

import torch

from finespun.contract import register
from finespun.contract.delta import Factors
from finespun.errors import InputError
from finespun.methods.initializers.pieces.starts import FactorStart, Place

SIZE = 0.1


@register
@dataclass(frozen=True, kw_only=True)
class Orthogonal(FactorStart):
    """A0 = Q[0::2]ᵀ X_a / 10, B0 = X_b Q[1::2] / 10, Q (r, r) random orthogonal, X normal; r even.

    Good for: factors that both learn from the first step, without looking at the base.
    Not for: odd ranks.

    B0 A0 is zero up to rounding, and each factor has rank r / 2; what rounding leaves is taken away
    as an exact start. Source: the `orthogonal` start of PEFT.
    """

    kind = "orthogonal"
    source = "PEFT 0.21"

    def factors(self, place: Place) -> Factors:
        r, shape = place.rank, place.delta.site.shape
        if r % 2:
            raise InputError(f"orthogonal needs an even rank, {place.name!r} has {r}; try {r + 1}")
        g = place.generator("orthogonal")
        Q = torch.linalg.qr(torch.randn(r, r, generator=g))[0]
        A = Q[0::2].mT @ torch.randn(r // 2, shape.in_features, generator=g) * SIZE
        B = torch.randn(shape.out_features, r // 2, generator=g) @ Q[1::2] * SIZE
        device = place.delta.site.device
        return A.to(device), B.to(device)
