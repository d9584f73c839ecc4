"""LoR2C: a low-rank way around every block (arXiv 2503.00572)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Bypass, Delta, Factors, module_group
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    Scores,
    register,
)
from finespun.errors import PlanError
from finespun.methods.structures.lora import LoRADelta


@register
@dataclass(frozen=True, kw_only=True)
class LoR2C(Ranked):
    """h ← F(h) + c·B·A h around a block F of width d;  A (r, d), B (d, r);  2·d·r parameters a
    block.

    Good for: one small update around a block instead of several inside it.
    Not for: anything that must be merged into weights or exported as a LoRA.

    With `share` all blocks have one A: d·r parameters and d·r a block. B starts at zero, A is drawn
    as LoRA's. It is no update of any weight: it cannot be merged, nor exported as a LoRA. After a
    block that ends in a norm (BERT's) it adds behind the norm: keep c at 2 or below.
    `allocation.MergeInject` joins neighbouring bypasses into one around both blocks, and turns a
    bypass into LoRAs of half the rank in those layers of its block that are targets too; until
    then these sleep. Source: arXiv 2503.00572.
    """

    share: bool = False

    kind = "lor2c"
    site_kind = "block"
    source = "arXiv 2503.00572"

    def plan(self, sites: Sequence[Site], scores: Scores | None = None) -> Plan:
        blocks = [s.shape.name for s in sites if s.shape.kind == "block"]
        for name in (s.shape.name for s in sites if s.shape.kind != "block"):
            if not any(name.startswith(block + ".") for block in blocks):
                raise PlanError(
                    f"{name!r} is a layer inside none of the targets: LoR2C goes around blocks; "
                    "name the blocks"
                )
        return super().plan(sites, scores)

    def choose(self, site: Site) -> dict[str, Any]:
        choice = super().choose(site)
        inside = {"rank": self.inside_rank, "asleep": True}
        return choice if site.shape.kind == "block" else choice | inside

    @property
    def inside_rank(self) -> int:
        """The rank of the LoRAs that take over inside a block."""
        return max(1, self.rank // 2)

    def bank(self, plan: Plan) -> Bank | None:
        widths = self._widths(plan)
        if not self.share or not widths:
            return None
        if len(widths) > 1:
            named = ", ".join(f"{name!r} has {width}" for width, name in widths.items())
            raise PlanError(f"blocks of different widths cannot share A: {named}; try share=False")
        bank = Bank()
        bank.A = nn.Parameter(self.kaiming("", "A", (self.rank, *widths)))
        return bank

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> Delta:
        choice, name = plan.choices[site.shape.name], site.shape.name
        if not choice["rank"]:
            return End(site)
        if self.share and site.shape.kind == "block":
            return SharedLoR2CDelta(site, Bank.at(bank, site), choice["rank"], choice["scale"])
        form = LoR2CDelta if site.shape.kind == "block" else InsideDelta
        delta = form(site, choice["rank"], choice["scale"])
        delta.A.data.copy_(self.kaiming(name, "A", delta.A.shape))
        if choice.get("asleep"):
            delta.switch_off(module_group(delta))
        return delta

    def _rank_of(self, shape: SiteShape, choice: Choice) -> int:
        return int(choice.get("rank", self.rank if shape.kind == "block" else self.inside_rank))

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        sides = shape.in_features + shape.out_features
        if shape.kind == "block" and self.share:
            sides = shape.out_features
        return self._rank_of(shape, choice) * sides

    def total_parameters(self, plan: Plan) -> int:
        """Without what sleeps."""
        asleep = [s for s in plan.sites if plan.choices[s.name].get("asleep")]
        sleeping = sum(self.num_parameters(s, plan.choices[s.name]) for s in asleep)
        return super().total_parameters(plan) - sleeping

    def num_shared_parameters(self, plan: Plan) -> int:
        return self.rank * min(self._widths(plan), default=0) if self.share else 0

    def _widths(self, plan: Plan) -> dict[int, str]:
        """Width -> a block of it that has a bypass."""
        blocks = [s for s in plan.sites if s.kind == "block" and plan.choices[s.name]["rank"]]
        return {s.in_features: s.name for s in blocks}

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return 2 * tokens * self._rank_of(shape, choice) * (shape.in_features + shape.out_features)


def spectrum_score(delta: Delta) -> dict[str, float]:
    """sfs = 1 − (σ_1 + .. + σ_⌊r/2⌋) / (σ_1 + .. + σ_r) of B·A: near ½ the spectrum is flat, at 0
    half the ranks do nothing. Empty while B·A is zero."""
    σ = delta.as_low_rank().singular_values()
    total = float(σ.sum())
    return {"sfs": 1.0 - float(σ[: len(σ) // 2].sum()) / total} if total > 0 and len(σ) > 1 else {}


class InsideDelta(LoRADelta):
    """A (r/2, in) and B (out, r/2) in a layer of a block; asleep until the bypass turns into it."""

    diagnostics = spectrum_score

    def compact(self) -> tuple[Any, dict[str, Any]]:
        if self.silent:
            return End(self.site), {"rank": 0}
        small, choice = super().compact()
        own = type(self)(self.site, choice["rank"], choice["scale"])
        own.load_state_dict(small.state_dict())
        return own, choice


class LoR2CDelta(Bypass, InsideDelta):
    """A (r, d) and B (d, r)."""


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

    diagnostics = spectrum_score

    def compact(self) -> tuple[Delta, dict[str, Any]]:
        return (End(self.site), {"rank": 0}) if self.silent else (self, {})


class End(Bypass):
    """A block that a span begins or ends at and whose own bypass is gone: no parameters."""

    def low_rank(self) -> Factors:
        A = torch.zeros(0, self.site.shape.in_features, device=self.site.device)
        return A, A.new_zeros(self.site.shape.out_features, 0)
