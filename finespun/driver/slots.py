"""What hooks hang into layers during a run, and how all of it goes again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from finespun.contract import Delta, Group, Moment, Need
from finespun.contract.training import Mixer, Overlay
from finespun.driver.perturbing import Perturbation
from finespun.driver.stillness import Stillness
from finespun.errors import InputError, StateError, nearest
from finespun.hosts import Host, View
from finespun.hosts.slots import Kind, checked_gain


class Desk:
    """What the slots of all hooks of a run share: sites, perturbation, stillness, the moment."""

    def __init__(
        self,
        view: View,
        perturbation: Perturbation,
        stillness: Stillness,
        moment: Callable[[], Moment],
    ) -> None:
        self.view, self.perturbation, self.stillness = view, perturbation, stillness
        self.moment = moment

    def delta(self, site: str) -> Delta:
        """The adapter's delta at a site. Raises InputError for an unknown one."""
        deltas = self.view.deltas
        if site not in deltas:
            raise InputError(f"{self.view.name!r} has no site {site!r}; {nearest(site, deltas)}")
        return deltas[site]

    def host(self, site: str) -> Host:
        """The layer's host there. Raises StateError where the delta sits in no model."""
        host = self.delta(site).site
        if not isinstance(host, Host):
            raise StateError(f"{site!r} is no layer of a model: nothing can hang there")
        return host

    def close(self, owners: Sequence[str]) -> None:
        """Take away all that these owners have hung up, perturbations and holds as well."""
        self.perturbation.undo()
        self.stillness.held.clear()
        for delta in self.view.deltas.values():
            if isinstance(delta.site, Host):
                for owner in owners:
                    delta.site.slots.free(f"hooks {owner}")


class OwnSlots:
    """`contract.Slots` of one owner, held to what it declared in `needs`."""

    def __init__(self, desk: Desk, owner: str, needs: frozenset[Need]) -> None:
        self.desk, self.owner, self.needs = desk, owner, needs

    def gain(self, site: str, value: Tensor | None) -> None:
        self.require(Need.GAIN)
        host = self.desk.host(site)
        own = None if value is None else checked_gain(value, host.shape.out_features, site)
        self._put("gain", site, own)

    def overlay(self, site: str, function: Overlay | None) -> None:
        self.require(Need.OVERLAY)
        model, moment = self.desk.view.model, self.desk.moment

        def added(x: Tensor) -> Tensor | None:
            return function(x, moment()) if function is not None and model.training else None

        self._put("overlay", site, None if function is None else added)

    def mixer(self, site: str, function: Mixer | None) -> None:
        self.require(Need.MIXER)
        self._put("mixer", site, function)

    def perturb(self, changes: Mapping[nn.Parameter, Tensor]) -> None:
        self.require(Need.PERTURBATION)
        self.desk.perturbation.add(changes)

    def hold_still(self, site: str, group: Group) -> None:
        self.require(Need.HOLD)
        self.desk.stillness.hold(self.desk.delta(site), group)

    def require(self, need: Need) -> None:
        """Raise StateError for a need that the hooks did not declare: what is not declared cannot
        be refused where it does not fit."""
        if need not in self.needs:
            raise StateError(
                f"{self.owner} uses {need.value!r} without saying so: add Need.{need.name} to its "
                "needs"
            )

    def _put(self, kind: Kind, site: str, value: Any) -> None:
        host = self.desk.host(site)
        host.slots.put(kind, self.desk.view.name, f"hooks {self.owner}", value)
