"""The baseline of every comparison: the model stays frozen and only its head is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finespun.structures import Plan, Site, SiteShape, Structure


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Structure):
    """ΔW = 0 everywhere: a plan without sites, 0 numbers; the head learns as for any structure."""

    kind = "none"

    def plan(self, sites: Sequence[Site], scores: Mapping[str, float] | None = None) -> Plan:
        return Plan(())

    def numbers(self, shape: SiteShape) -> int:
        return 0

    def flops(self, shape: SiteShape, tokens: int = 1) -> int:
        return 0
