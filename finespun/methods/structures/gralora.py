"""GraLoRA: a k x k grid of small LoRAs, of rank k·r for LoRA's parameters (arXiv 2505.20355)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta, Factors
from finespun.contract.products import Product, cells
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    must_divide,
    nearest_divisor,
    register,
)
from finespun.errors import InputError


@register
@dataclass(frozen=True, kw_only=True)
class GraLoRA(Ranked):
    """Cell (j, n) of ΔW, output block j and input block n of k each, is c·B_jn·A_jn of rank r/k.

    Good for: ranks of 32 and more: k times the rank of a LoRA of equal count.
    Not for: small ranks, and sides that k does not divide.

    A (k, r, in/k): rows j·r/k.. of A[n] are A_jn; B (k, out/k, r): columns n·r/k.. of B[j] are
    B_jn. r·(in + out) parameters as in LoRA, rank up to k·r; k must divide in, out and r. Good k
    has r/k² of 4 to 8. `hybrid_rank` h adds a plain LoRA of rank h: (r + h)·(in + out) parameters.
    c = alpha / (r + h). B starts at zero, A[n] is drawn as LoRA's for in/k inputs.
    Source: arXiv 2505.20355.
    """

    rank: int = 32
    k: int = 2
    hybrid_rank: int = 0

    kind = "gralora"
    sizes = ("rank", "hybrid_rank")
    source = "arXiv 2505.20355"
    aliases = {
        **Ranked.aliases,
        "gralora_k": "k",
        "hybrid_r": "hybrid_rank",
        "gralora_dropout": "dropout",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or self.rank % self.k:
            best = nearest_divisor(self.k, self.rank)
            raise InputError(f"k={self.k} does not divide rank={self.rank}; nearest: {best}")
        if self.hybrid_rank < 0:
            raise InputError(f"hybrid_rank={self.hybrid_rank} must not be negative; try 0")

    @property
    def scale(self) -> float:
        return super().scale * (1.0 if self.alpha is None else self.rank / self.total_rank)

    @property
    def total_rank(self) -> int:
        """r + h, what LoRA of as many parameters has."""
        return self.rank + self.hybrid_rank

    def choose(self, site: Site) -> dict[str, Any]:
        must_divide("k", self.k, site.shape, self.rank)
        return {**super().choose(site), "k": self.k}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "GraLoRADelta":
        choice, name = plan.choices[site.shape.name], site.shape.name
        delta = GraLoRADelta(site, choice["rank"], self.hybrid_rank, choice["k"], choice["scale"])
        delta.A.data.copy_(self.kaiming(name, "A", delta.A.shape))
        if self.hybrid_rank:
            delta.A_hybrid.data.copy_(self.kaiming(name, "A_hybrid", delta.A_hybrid.shape))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return (self.rank_of(choice) + self.hybrid_rank) * (shape.in_features + shape.out_features)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return 2 * tokens * self.num_parameters(shape, choice)


class GraLoRADelta(Delta):
    """A (k, r, in/k), B (k, out/k, r) and, for h > 0, A_hybrid (h, in), B_hybrid (out, h)."""

    def __init__(self, site: Site, rank: int, hybrid: int, k: int, scale: float) -> None:
        super().__init__(site)
        self.scale, self.k, self.hybrid = scale, k, hybrid
        out, inner, device = site.shape.out_features, site.shape.in_features, site.device
        self.A = nn.Parameter(torch.zeros(k, rank, inner // k, device=device))
        self.B = nn.Parameter(torch.zeros(k, out // k, rank, device=device))
        if hybrid:
            self.A_hybrid = nn.Parameter(torch.zeros(hybrid, inner, device=device))
            self.B_hybrid = nn.Parameter(torch.zeros(out, hybrid, device=device))

    def low_rank(self) -> Factors:
        """Rank k·r + h: row (n, j, ρ) of A reads input block n, column (n, j, ρ) of B writes output
        block j."""
        cells = self.B.unflatten(-1, (self.k, -1)).permute(1, 2, 3, 0)
        B = torch.diag_embed(cells).permute(3, 0, 1, 4, 2).flatten(0, 1).flatten(1)
        A = torch.block_diag(*self.A)
        if not self.hybrid:
            return A, B
        return torch.cat([A, self.A_hybrid]), torch.cat([B, self.B_hybrid], dim=1)

    def products(self) -> list[Product]:
        """B_jn·A_jn of every cell, those of the first input block first, and the hybrid's."""
        if self.dead:
            return []
        k, t, gate = self.k, self.A.shape[1] // self.k, self.gating

        def left(i: int) -> Tensor:
            n, j = divmod(i, k)
            return self.B_hybrid if n == k else self.B[j, :, n * t : (n + 1) * t]

        def right(i: int) -> Tensor:
            n, j = divmod(i, k)
            return self.A_hybrid if n == k else self.A[n, j * t : (j + 1) * t]

        sizes = [t] * (k * k) + [self.hybrid] * bool(self.hybrid)
        gates = [None] * len(sizes) if gate is None else list(gate.split(sizes))
        return cells(left, right, gates, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.adjusted or self.k == 1:
            return super().forward(x)
        x = x.to(self.A.dtype)
        u = x.reshape(-1, self.k, x.shape[-1] // self.k).transpose(0, 1) @ self.A.mT
        u = u.unflatten(-1, (self.k, -1)).transpose(0, 2).flatten(-2)
        y = (u @ self.B.mT).transpose(0, 1)
        y = y.reshape(*x.shape[:-1], self.site.shape.out_features)
        if self.hybrid:
            y = y + F.linear(F.linear(x, self.A_hybrid), self.B_hybrid)
        return y * self.scale

    def direct(self, tokens: int, formed: bool) -> bool:
        return not self.adjusted and self.k > 1
