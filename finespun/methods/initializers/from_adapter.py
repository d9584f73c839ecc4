"""From an adapter: the update starts as another one, in this structure."""

from dataclasses import dataclass

from finespun.contract import Need, register
from finespun.contract.delta import Factors
from finespun.methods.initializers.pieces.starts import FactorStart, Place


@register
@dataclass(frozen=True, kw_only=True)
class FromAdapter(FactorStart):
    """ΔW(θ0) = the nearest of ΔW of the adapter in `adapter`, site by site.

    Good for: going on in another structure, or at another rank, where a training ended.
    Not for: adapters of other layers.

    Any structure, and any folder that Finespun reads. The model starts where that adapter left it;
    with `exact` it starts at its base, and the adapter gives the directions alone. What the
    structure cannot hold is reported.
    """

    adapter: str = ""
    exact: bool = False

    kind = "from_adapter"
    source = "this package"
    needs = frozenset({Need.UPDATES})

    @property
    def folder(self) -> str:
        return self.adapter

    @property
    def moves(self) -> bool:
        return not self.exact

    def factors(self, place: Place) -> Factors:
        update = place.measured.update(place.name)
        A = place.check(update.A, "update")
        return A, place.check(update.B, "update") / place.scale
