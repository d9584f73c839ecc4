"""BOFT: a rotation made of sparse butterfly factors, and a gain per output (arXiv 2311.06243)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Base, Delta
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Structure,
    register,
)
from finespun.errors import InputError, PlanError
from finespun.methods.structures.oft import cayley, cayley_flops, multiply_blocks

SIZES = ("block_size", "factors")


@register
@dataclass(frozen=True, kw_only=True)
class BOFT(Structure):
    """W = diag(s)·W0·Qᵀ, Q = Q_m ·· Q_1, Q_i = P_i·diag(R_i1 .. R_in)·P_iᵀ; R_ij b x b, n = in/b.

    Good for: rotations that reach distant inputs, and a scale for each output.
    Not for: fast steps, as every factor is a product of its own; LoRA servers.

    R_ij = (I − S)(I + S)⁻¹, S = (X − Xᵀ)/2, from X (m, n, b, b), zero at the start; s (out,) is one
    at the start: m·in·b + out parameters, of which only (b−1)/2 in b of X count. P_i sorts each run
    of 2^(i−1)·b inputs by the parity of its half-blocks, so that m factors mix 2^(m−1)·b inputs,
    which must divide in. b is `block_size`, m is `factors`. The bias stays. Full rank.
    Source: arXiv 2311.06243.
    """

    block_size: int = 4
    factors: int = 1

    kind = "boft"
    sizes = ("factors",)
    source = "arXiv 2311.06243"
    aliases = {"boft_block_size": "block_size", "boft_n_butterfly_factor": "factors"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2 or (self.factors > 1 and self.block_size % 2):
            raise InputError(
                f"block_size={self.block_size} must be at least 2, and even for several factors; "
                f"try {max(2, self.block_size + self.block_size % 2)}"
            )
        if self.factors < 1:
            raise InputError(f"factors={self.factors} must be at least 1; try 1")

    def choose(self, site: Site) -> dict[str, Any]:
        n, reach = site.shape.in_features, self.block_size << (self.factors - 1)
        if n % reach:
            fits = [b for b in range(2, n + 1) if n % (b << (self.factors - 1)) == 0]
            fits = [b for b in fits if self.factors == 1 or b % 2 == 0]
            best = min(fits, key=lambda b: abs(b - self.block_size), default=None)
            advice = f"block_size={best}" if best else "fewer factors"
            raise PlanError(
                f"block_size={self.block_size} with factors={self.factors} mixes {reach} inputs, "
                f"which does not divide in={n} of {site.shape.name!r}; nearest: {advice}"
            )
        return {"block_size": self.block_size, "factors": self.factors}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "BOFTDelta":
        choice = plan.choices[site.shape.name]
        return BOFTDelta(site, choice["block_size"], choice["factors"])

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        b, m = (choice.get(k, getattr(self, k)) for k in SIZES)
        return int(m * shape.in_features * b + shape.out_features)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """2·m·in·b on x and three per output; the rotations once."""
        n, b, m = shape.in_features, *(choice.get(k, getattr(self, k)) for k in SIZES)
        return tokens * (2 * m * n * b + 3 * shape.out_features) + cayley_flops(m * n // b, b)


class BOFTDelta(Delta):
    """X (m, n, b, b) and s (out,)."""

    def __init__(self, site: Site, block: int, factors: int) -> None:
        super().__init__(site)
        n, device = site.shape.in_features, site.device
        self.X = nn.Parameter(torch.zeros(factors, n // block, block, block, device=device))
        self.s = nn.Parameter(torch.ones(site.shape.out_features, device=device))

    def turn(self) -> Tensor:
        """R_ij − I, (m, n, b, b)."""
        return cayley((self.X.mT - self.X) / 2)

    def rotate(self, x: Tensor, turns: Tensor, which: range) -> Tensor:
        """What the factors of `which`, in that order, add to x (..., in)."""
        change, half = torch.zeros_like(x), turns.shape[-1] // 2
        for i in which:
            now = x + change
            if i == 0:
                change = change + multiply_blocks(now, turns[0])
            else:
                turned = multiply_blocks(swap(now, 2, 1 << i, half), turns[i])
                change = change + swap(turned, 1 << i, 2, half)
        return change

    def delta(self, w0: Tensor) -> Tensor:
        s = self.s[:, None]
        return s * self.rotate(w0, self.turn().mT, range(len(self.X))) + (s - 1) * w0

    def through(self, x: Tensor, base: Base) -> Tensor:
        last_first = range(len(self.X) - 1, -1, -1)
        change = self.rotate(x.to(self.X.dtype), self.turn(), last_first)
        y, b0 = base(x + change.to(x.dtype)), self.site.bias()
        return y + ((self.s - 1) * (y if b0 is None else y - b0)).to(y.dtype)


def swap(x: Tensor, first: int, second: int, width: int) -> Tensor:
    """x (..., n·first·second·width), read as that shape, `first` and `second` swapped: of pairs of
    half-blocks (second = 2) all even ones come out before all odd ones."""
    return x.unflatten(-1, (-1, first, second, width)).transpose(-3, -2).flatten(-4)
