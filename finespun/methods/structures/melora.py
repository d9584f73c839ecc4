"""MELoRA: n small LoRAs side by side, one for each slice of input and output (arXiv 2402.17263)."""

from dataclasses import dataclass
from typing import Any

import torch
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
class MELoRA(Ranked):
    """ΔW = c·blockdiag(B_1 A_1, ..., B_n A_n);  r·(in + out)/n parameters, rank r.

    Good for: the rank of LoRA at an n-th of its parameters.
    Not for: tasks in which an output must read inputs outside its own slice.

    A_i (r/n, in/n), B_i (out/n, r/n); `blocks` is n and must divide r, in and out. B starts at
    zero, A_i is drawn as LoRA's for in/n inputs; c = alpha / r. Source: arXiv 2402.17263.
    """

    blocks: int = 2

    kind = "melora"
    source = "arXiv 2402.17263"
    aliases = {**Ranked.aliases, "n": "blocks"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1 or self.rank % self.blocks:
            best = nearest_divisor(self.blocks, self.rank)
            raise InputError(
                f"blocks={self.blocks} does not divide rank={self.rank}; nearest: {best}"
            )

    def choose(self, site: Site) -> dict[str, Any]:
        must_divide("blocks", self.blocks, site.shape, self.rank)
        return {**super().choose(site), "blocks": self.blocks}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "MELoRADelta":
        choice: Any = plan.choices[site.shape.name]
        delta = MELoRADelta(site, choice["rank"], choice["blocks"], choice["scale"])
        delta.A.data.copy_(self.kaiming(site.shape.name, "A", delta.A.shape))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return self.rank_of(choice) * (shape.in_features + shape.out_features) // self.blocks

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return 2 * tokens * self.num_parameters(shape, choice)


class MELoRADelta(Delta):
    """A (n, r/n, in/n) and B (n, out/n, r/n)."""

    def __init__(self, site: Site, rank: int, blocks: int, scale: float) -> None:
        super().__init__(site)
        self.scale, thin = scale, rank // blocks
        sizes = site.shape.in_features // blocks, site.shape.out_features // blocks
        self.A = nn.Parameter(torch.zeros(blocks, thin, sizes[0], device=site.device))
        self.B = nn.Parameter(torch.zeros(blocks, sizes[1], thin, device=site.device))

    def low_rank(self) -> Factors:
        return torch.block_diag(*self.A), torch.block_diag(*self.B)

    def products(self) -> list[Product]:
        """B_i·A_i of every block."""
        if self.dead:
            return []
        n, thin, gate = *self.A.shape[:2], self.gating
        gates = [None] * n if gate is None else list(gate.split(thin))
        return cells(lambda i: self.B[i], lambda i: self.A[i], gates, self.scale)

    def product(self, x: Tensor) -> Tensor:
        slices = x.to(self.A.dtype).reshape(-1, len(self.A), self.A.shape[-1]).transpose(0, 1)
        y = slices @ self.A.mT @ self.B.mT
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.site.shape.out_features) * self.scale
