"""Block-LoRA: the blocks of B share one block of A (arXiv 2501.16720)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    must_divide,
    nearest_divisor,
    register,
)
from finespun.errors import InputError

LAYOUTS = ("folded", "literal", "input")


@register
@dataclass(frozen=True, kw_only=True)
class BlockLoRA(Ranked):
    """ΔW = c·(Σ_i B_i)·A_s with `blocks` n of B, each (out, r/n), and one A_s (r/n, in).

    Good for: few-shot tuning with half the parameters of LoRA or fewer.
    Not for: rank: ΔW has rank r/n in the first two layouts, whatever r says.

    `layout`: "folded" trains one of the B_i, which from equal starts stay equal under Adam:
    ΔW = c·n·B_1·A_s, (r/n)·(in + out) parameters, LoRA of rank r/n whose B learns n times faster;
    "literal" trains all n, r·out + (r/n)·in parameters; "input" cuts the input instead: A_s
    (r, in/n) meets the sum of the n pieces of x, B is (out, r), r·out + r·in/n parameters, rank r.
    B starts at zero, A_s is drawn as LoRA's; c = alpha / √r, alpha 1 unless given.
    Source: arXiv 2501.16720 (its code is not public: the layouts follow the abstract).
    """

    rank: int = 4
    blocks: int = 2
    layout: Literal["folded", "literal", "input"] = "folded"

    kind = "block_lora"
    title = "Block-LoRA"
    source = "arXiv 2501.16720"
    aliases = {**Ranked.aliases, "n": "blocks"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in LAYOUTS:
            raise InputError(f"layout={self.layout!r} is not one of {', '.join(LAYOUTS)}")
        if self.blocks < 1 or (self.layout != "input" and self.rank % self.blocks):
            best = nearest_divisor(self.blocks, self.rank)
            raise InputError(
                f"blocks={self.blocks} does not divide rank={self.rank}; nearest: {best}"
            )

    @property
    def scale(self) -> float:
        return (1.0 if self.alpha is None else self.alpha) / math.sqrt(self.rank)

    def choose(self, site: Site) -> dict[str, Any]:
        if self.layout == "input":
            must_divide("blocks", self.blocks, site.shape, sides=("in",))
        return {**super().choose(site), "blocks": self.blocks}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "BlockLoRADelta":
        delta = BlockLoRADelta(site, plan.choices[site.shape.name], self.layout)
        delta.A.data.copy_(self.kaiming(site.shape.name, "A", delta.A.shape))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        thin, n = self.rank_of(choice) // self.blocks, self.blocks
        return {
            "folded": thin * (shape.in_features + shape.out_features),
            "literal": self.rank_of(choice) * shape.out_features + thin * shape.in_features,
            "input": self.rank_of(choice) * (shape.out_features + shape.in_features // n),
        }[self.layout]

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """Two products a row; adding the blocks of B once a step or the pieces of every row."""
        n_in, n_out, n = shape.in_features, shape.out_features, self.blocks
        if self.layout == "input":
            return tokens * (2 * self.num_parameters(shape, choice) + (n - 1) * (n_in // n))
        adds = (n - 1) * n_out * (self.rank_of(choice) // n) if self.layout == "literal" else 0
        return 2 * tokens * (self.rank_of(choice) // n) * (n_in + n_out) + adds


class BlockLoRADelta(Delta):
    """A (r/n, in) and B (out, r/n); literal B (n, out, r/n); input A (r, in/n), B (out, r)."""

    def __init__(self, site: Site, choice: Mapping[str, Any], layout: str) -> None:
        super().__init__(site)
        self.blocks, self.layout, rank = choice["blocks"], layout, choice["rank"]
        out, inner = site.shape.out_features, site.shape.in_features
        across = layout == "input"
        thin = rank if across else rank // self.blocks
        B = (self.blocks, out, thin) if layout == "literal" else (out, thin)
        A = (thin, inner // self.blocks if across else inner)
        self.scale = choice["scale"] * (self.blocks if layout == "folded" else 1)
        self.A = nn.Parameter(torch.zeros(A, device=site.device))
        self.B = nn.Parameter(torch.zeros(B, device=site.device))

    def low_rank(self) -> Factors:
        if self.layout == "literal":
            return self.A, self.B.sum(0)
        return self.A.repeat(1, self.blocks) if self.layout == "input" else self.A, self.B

    def products(self) -> list[Product]:
        """B·A, whose copies stand side by side where the input is cut. The blocks of the literal
        layout have none, as they share one A."""
        if self.layout != "input" or self.dead:
            return super().products()
        return [Product.of(lambda: self.B, lambda: self.A, self.scale, self.gating)]

    def forward(self, x: Tensor) -> Tensor:
        if self.layout != "input" or self.adjusted:
            return super().forward(x)
        pieces = x.to(self.A.dtype).unflatten(-1, (self.blocks, -1)).sum(-2)
        return F.linear(F.linear(pieces, self.A), self.B) * self.scale

    def direct(self, tokens: int, formed: bool) -> bool:
        return self.layout == "input" and not self.adjusted
