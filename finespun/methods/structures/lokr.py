"""LoKr: a small matrix Kronecker a low-rank one (arXiv 2309.14859)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta, Factors
from finespun.contract.products import Product
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    must_be_positive,
    register,
)
from finespun.kernels.kron import kron_apply, kron_macs


@register
@dataclass(frozen=True, kw_only=True)
class LoKr(Ranked):
    """ΔW = c·(P ⊗ Q);  P (u_out, u_in), Q = Q_b·Q_a (v_out, v_in) of rank r;  out = u_out·v_out,
    in = u_in·v_in;  u_out·u_in + r·(v_out + v_in) parameters, rank up to r·min(u_out, u_in).

    Good for: much rank from few parameters, with a size to trade between them.
    Not for: LoRA servers: its exact rank is large.

    `factor` is u where it divides a side, else a bound on it; -1 splits near the square root,
    smaller part first: 24·32 for 768. Q is one full matrix where r is at least half its larger
    side; with `decompose_both` P = P_b·P_a likewise. P (or P_b) starts at zero, the others uniform
    with variance 1/(3·columns). c = alpha / r even where nothing has rank r.
    Source: arXiv 2309.14859.
    """

    factor: int = -1
    decompose_both: bool = False

    kind = "lokr"
    source = "arXiv 2309.14859"
    aliases = {"r": "rank", "decompose_factor": "factor"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor != -1:
            must_be_positive(factor=(self.factor, -1))

    def choose(self, site: Site) -> dict[str, Any]:
        u, v = self.split(site.shape)
        return {**super().choose(site), "u": u, "v": v}

    def split(self, shape: SiteShape) -> tuple[list[int], list[int]]:
        """(u_out, u_in) and (v_out, v_in)."""
        pairs = [divide(n, self.factor) for n in (shape.out_features, shape.in_features)]
        return [u for u, _ in pairs], [v for _, v in pairs]

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "LoKrDelta":
        choice = plan.choices[site.shape.name]
        P_rank, Q_rank = choice.get("ranks") or self.ranks(choice)
        delta = (LoKrFactors if Q_rank else LoKrDelta)(site, choice, P_rank, Q_rank)
        for name, numbers in delta.named_parameters():
            if name not in ("P", "P_b"):
                numbers.data.copy_(self.kaiming(site.shape.name, name, numbers.shape))
        return delta

    def ranks(self, choice: Mapping[str, Any]) -> tuple[int, int]:
        """Those of P and Q, 0 for one that is whole; files of others may give their own."""
        both = self.decompose_both and self.low(choice["u"])
        return choice["rank"] * both, choice["rank"] * self.low(choice["v"])

    def low(self, sides: list[int]) -> bool:
        """Whether a matrix of these sides is written with rank r."""
        return 2 * self.rank < max(sides)

    def chosen(self, shape: SiteShape, choice: Choice) -> tuple[Any, Any, int, int]:
        """u, v and the ranks of P and Q, by a plan's choice or the structure's own."""
        u, v = self.split(shape) if "u" not in choice else (choice["u"], choice["v"])
        own = {"u": u, "v": v, "rank": self.rank_of(choice)}
        return u, v, *(choice.get("ranks") or self.ranks(own))

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        u, v, P_rank, Q_rank = self.chosen(shape, choice)
        P, Q = (r * sum(sides) or math.prod(sides) for r, sides in ((P_rank, u), (Q_rank, v)))
        return int(P + Q)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """Q_a, P, Q_b one after the other; forming P once where it has factors."""
        u, v, P_rank, Q_rank = self.chosen(shape, choice)
        per_row = kron_macs(1, u[0], v[0], u[1], v[1])
        if Q_rank:
            per_row = Q_rank * (math.prod(u) + shape.in_features + shape.out_features)
        return int(2 * (tokens * per_row + math.prod(u) * P_rank))


class LoKrDelta(Delta):
    """P (u_out, u_in), or P_b (u_out, r) and P_a (r, u_in); Q (v_out, v_in), or Q_b and Q_a."""

    reads_base = False

    def __init__(self, site: Site, choice: Mapping[str, Any], P_rank: int, Q_rank: int) -> None:
        super().__init__(site)
        self.scale = choice["scale"]
        for name, (rows, columns), r in (("P", choice["u"], P_rank), ("Q", choice["v"], Q_rank)):
            parts = {f"{name}_b": (rows, r), f"{name}_a": (r, columns)} if r else {}
            for part, size in (parts or {name: (rows, columns)}).items():
                zeros = torch.zeros(size, device=site.device)
                self.register_parameter(part, nn.Parameter(zeros))

    def factor(self, name: str) -> Tensor:
        """P or Q, formed where it has factors."""
        if name in self._parameters:
            whole: Tensor = getattr(self, name)
            return whole
        product: Tensor = getattr(self, f"{name}_b") @ getattr(self, f"{name}_a")
        return product

    def delta(self, w0: Tensor) -> Tensor:
        return torch.kron(self.factor("P") * self.scale, self.factor("Q"))

    def products(self) -> list[Product]:
        """P_b·P_a and Q_b·Q_a, those that have factors; of whole P and Q, vec(P) vec(Q)ᵀ; none
        behind a gate."""
        if self.dead or self.gating is not None:
            return []
        own = self._parameters
        if "P" in own and "Q" in own:
            P, Q = self.get_parameter("P"), self.get_parameter("Q")
            return [Product.of(lambda: P.view(-1, 1), lambda: Q.view(1, -1), self.scale)]
        return [
            Product.of(partial(self.get_parameter, f"{n}_b"), partial(self.get_parameter, f"{n}_a"))
            for n in "PQ"
            if n not in own
        ]

    def product(self, x: Tensor) -> Tensor:
        P, Q = self.factor("P"), self.factor("Q")
        return kron_apply(P[None], Q[None], x.to(P.dtype)) * self.scale


class LoKrFactors(LoKrDelta):
    """Q of rank r: exact factors of rank r·min(u_out, u_in)."""

    Q_a: nn.Parameter
    Q_b: nn.Parameter

    def low_rank(self) -> Factors:
        P, Q_b, Q_a = self.factor("P"), self.Q_b, self.Q_a
        wide = P.shape[0] < P.shape[1]
        eye = torch.eye(min(P.shape), dtype=P.dtype, device=P.device)
        return torch.kron(P if wide else eye, Q_a), torch.kron(eye if wide else P, Q_b)

    def product(self, x: Tensor) -> Tensor:
        P = self.factor("P")
        h = F.linear(x.to(P.dtype).unflatten(-1, (P.shape[1], -1)), self.Q_a)
        return F.linear(P @ h, self.Q_b).flatten(-2) * self.scale


def divide(n: int, factor: int) -> tuple[int, int]:
    """(u, v) with u·v = n: u is `factor` where that divides n, else the largest divisor up to
    √n, and up to `factor` unless that is -1."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor == -1 else min(factor, math.isqrt(n))
    u = next(d for d in range(most, 0, -1) if n % d == 0)
    return u, n // u
