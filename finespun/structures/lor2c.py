"""LoR2C: a low-rank way around every block (arXiv 2503.00572)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finespun.errors import PlanError
from finespun.structures.delta import Bank, Bypass, Delta, Factors
from finespun.structures.lora import LoRADelta
from finespun.structures.site import Site, SiteShape
from finespun.structures.structure import Plan, Ranked, register


@register
@dataclass(frozen=True, kw_only=True)
class LoR2C(Ranked):
    """h ← F(h) + c·B·A h around a block F of width d;  A (r, d), B (d, r);  2·d·r numbers a block.

    Good for: one small update around a block instead of several inside it.
    Not for: anything that must be merged into weights or exported as a LoRA.

    With `share` all blocks have one A: d·r numbers and d·r a block. B starts at zero, A is drawn as
    LoRA's. It is no update of any weight: it cannot be merged, nor exported as a LoRA. After a
    block that ends in a norm (BERT's) it adds behind the norm: keep c at 2 or below.
    Source: arXiv 2503.00572.
    """

    share: bool = False

    kind = "lor2c"
    site_kind = "block"
    source = "arXiv 2503.00572"

    def bank(self, plan: Plan) -> Bank | None:
        if not self.share:
            return None
        widths = {s.in_features: s.name for s in plan.sites}
        if len(widths) > 1:
            named = ", ".join(f"{name!r} has {width}" for width, name in widths.items())
            raise PlanError(f"blocks of different widths cannot share A: {named}; try share=False")
        bank = Bank()
        bank.A = nn.Parameter(self.kaiming("", "A", (self.rank, *widths)))
        return bank

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> Delta:
        choice, name = plan.choices[site.shape.name], site.shape.name
        if self.share:
            return SharedLoR2CDelta(site, Bank.at(bank, site), choice["rank"], choice["scale"])
        delta = LoR2CDelta(site, choice["rank"], choice["scale"])
        delta.A.data.copy_(self.kaiming(name, "A", delta.A.shape))
        return delta

    def numbers(self, shape: SiteShape) -> int:
        return (1 if self.share else 2) * self.rank * shape.in_features

    def shared_numbers(self, plan: Plan) -> int:
        return self.rank * plan.sites[0].in_features if self.share else 0

    def flops(self, shape: SiteShape, tokens: int = 1) -> int:
        return 4 * tokens * self.rank * shape.in_features


def spectrum_score(delta: Delta) -> dict[str, float]:
    """sfs = 1 − (σ_1 + .. + σ_⌊r/2⌋) / (σ_1 + .. + σ_r) of B·A: near ½ the spectrum is flat, at 0
    half the ranks do nothing. Empty while B·A is zero."""
    σ = delta.as_low_rank().singular_values()
    total = float(σ.sum())
    return {"sfs": 1.0 - float(σ[: len(σ) // 2].sum()) / total} if total > 0 and len(σ) > 1 else {}


class LoR2CDelta(Bypass, LoRADelta):
    """A (r, d) and B (d, r)."""

    def diagnostics(self) -> dict[str, float]:
        return spectrum_score(self)

    def compact(self) -> tuple["LoR2CDelta", dict[str, Any]]:
        small, choice = super().compact()
        own = LoR2CDelta(self.site, choice["rank"], choice["scale"])
        own.load_state_dict(small.state_dict())
        return own, choice


class SharedLoR2CDelta(Bypass):
    """B (d, r); A (r, d) is the bank's."""

    per_sample: ClassVar[bool] = False

    def __init__(self, site: Site, bank: Bank, rank: int, scale: float) -> None:
        super().__init__(site, bank)
        self.scale = scale
        self.B = nn.Parameter(torch.zeros(site.shape.out_features, rank, device=site.device))

    def low_rank(self) -> Factors:
        A: Tensor = self.bank.A  # type: ignore[union-attr, assignment]
        return A, self.B

    def diagnostics(self) -> dict[str, float]:
        return spectrum_score(self)
