"""Tied weights: one update at both uses of a weight that two modules share."""

from torch import Tensor, nn

from finespun.contract import Delta
from finespun.contract.delta import Factors
from finespun.errors import TargetError
from finespun.hosts.layers.host import Host


class TiedDelta(Delta):
    """The update of another site, seen from the other side: ΔW' = ΔWᵀ where one use is a table and
    the other a linear layer, ΔW' = ΔW where both are alike. It has no parameters of its own."""

    def __init__(self, site: Host, source: Host, adapter: str) -> None:
        super().__init__(site)
        self.__dict__["source"] = source
        self.__dict__["adapter"] = adapter
        self.scale = self._delta().scale
        form = "low_rank" if "low_rank" in self._delta().written else "delta"
        self.__dict__["written"] = frozenset({form})

    def _delta(self) -> Delta:
        source: Host = self.__dict__["source"]
        return source.delta(self.__dict__["adapter"])

    @property
    def dead(self) -> bool:
        return self._delta().dead

    @property
    def _turned(self) -> bool:
        return self.__dict__["source"].kind != self.site.shape.kind

    def low_rank(self) -> Factors | None:
        pair = self._delta().factors()
        if pair is None or not self._turned:
            return pair
        return pair[1].mT, pair[0].mT

    def delta(self, w0: Tensor) -> Tensor:
        change = self._delta().dense(w0.mT if self._turned else w0)
        return change.mT if self._turned else change


def ties(model: nn.Module, targets: list[str]) -> dict[str, str]:
    """Module -> target for every other module that shares a target's weight.

    Raises TargetError where both uses are targets themselves.
    """
    owner: dict[int, str] = {}
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    for target in targets:
        weight = modules[target.partition(":")[0]]._parameters.get("weight")
        if weight is not None:
            owner[id(weight)] = target
    found: dict[str, str] = {}
    for name, module in modules.items():
        shared = owner.get(id(module._parameters.get("weight")))
        if shared is None or module is modules[shared.partition(":")[0]]:
            continue
        if name in targets:
            raise TargetError(f"{name!r} and {shared!r} share one weight: name one of them")
        found[name] = shared
    return found
