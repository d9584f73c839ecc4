"""KronA: one Kronecker product (arXiv 2212.10650)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta
from finespun.contract.products import Product
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Structure,
    register,
)
from finespun.errors import InputError, PlanError
from finespun.kernels.kron import kron_apply, kron_macs


@register
@dataclass(frozen=True, kw_only=True)
class KronA(Structure):
    """ΔW = c·(P ⊗ Q);  P (p_out, p_in), Q (out/p_out, in/p_in);  as many parameters as they hold.

    Good for: an update of full rank from very few parameters.
    Not for: growing with the task: no size trades parameters for accuracy; lsr and lokr have one.

    `factors` fixes (p_out, p_in), which must divide out and in; else each is the smallest divisor
    of at least the square root, 1,600 parameters for 768x768. c is `alpha`. The rank is
    rank(P)·rank(Q), up to full. Q starts at zero, P is uniform with variance 1/(3·p_in).
    Source: arXiv 2212.10650.
    """

    alpha: float = 1.0
    factors: tuple[int, int] | None = None

    kind = "krona"
    source = "arXiv 2212.10650"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"alpha={self.alpha} must be positive; try 1.0")
        if self.factors is not None and (len(self.factors) != 2 or min(self.factors) < 1):
            raise InputError(f"factors={self.factors} must be two sizes of P; try (32, 32)")

    def split(self, shape: SiteShape) -> tuple[int, int]:
        """(p_out, p_in)."""
        sides = shape.out_features, shape.in_features
        chosen = self.factors or (_upper(sides[0]), _upper(sides[1]))
        for p, n in zip(chosen, sides):
            if n % p:
                best = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - p))
                raise PlanError(
                    f"factors={chosen} cannot divide {shape.name!r} "
                    f"({sides[0]}x{sides[1]}): {p} is no divisor of {n}; nearest: {best}"
                )
        return chosen

    def choose(self, site: Site) -> dict[str, Any]:
        return {"factors": list(self.split(site.shape)), "scale": self.alpha}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "KronADelta":
        choice = plan.choices[site.shape.name]
        p_out, p_in = choice["factors"]
        delta = KronADelta(site, p_out, p_in, choice["scale"])
        delta.P.data.copy_(self.kaiming(site.shape.name, "P", delta.P.shape))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        p_out, p_in = choice.get("factors") or self.split(shape)
        return int(p_out * p_in + shape.out_features // p_out * (shape.in_features // p_in))

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return 2 * tokens * _macs(shape, *(choice.get("factors") or self.split(shape)))


class KronADelta(Delta):
    """P (p_out, p_in) and Q (out/p_out, in/p_in)."""

    reads_base = False

    def __init__(self, site: Site, p_out: int, p_in: int, scale: float) -> None:
        super().__init__(site)
        rows, columns = site.shape.out_features // p_out, site.shape.in_features // p_in
        self.scale = scale
        self.P = nn.Parameter(torch.zeros(p_out, p_in, device=site.device))
        self.Q = nn.Parameter(torch.zeros(rows, columns, device=site.device))

    def products(self) -> list[Product]:
        """vec(P) vec(Q)ᵀ, of inner size 1: the rearranged update."""
        if self.dead:
            return []
        return [Product.of(lambda: self.P.view(-1, 1), lambda: self.Q.view(1, -1), self.scale)]

    def delta(self, w0: Tensor) -> Tensor:
        return torch.kron(self.P * self.scale, self.Q)

    def product(self, x: Tensor) -> Tensor:
        return kron_apply(self.P[None], self.Q[None], x.to(self.P.dtype)) * self.scale

    def direct(self, tokens: int, formed: bool) -> bool:
        shape = self.site.shape
        cheaper = _macs(shape, *self.P.shape) < shape.out_features * shape.in_features
        return cheaper and not self.adjusted


def _upper(n: int) -> int:
    """The smallest divisor of n that is at least √n."""
    return n // next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)


def _macs(shape: SiteShape, p_out: int, p_in: int) -> int:
    return kron_macs(1, p_out, shape.out_features // p_out, p_in, shape.in_features // p_in)
