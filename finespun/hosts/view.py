"""An adapter in a model, as methods see it."""

import dataclasses
from collections.abc import Mapping

from torch import nn

from finespun.contract import Bank, Delta, Plan, Structure
from finespun.contract.mixing import CHOICE, Mixing, mount
from finespun.errors import InputError, StateError, nearest
from finespun.hosts.adapter_set import adapter_set_of
from finespun.hosts.attached import Attached
from finespun.hosts.layers.block import link


class View:
    """`contract.AdapterView` of adapter `name` of `model`."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    @property
    def entry(self) -> Attached:
        """What the model holds of it. Raises StateError where it is not active."""
        entry = adapter_set_of(self.model)[self.name]
        if not isinstance(entry, Attached):
            raise StateError(f"{self.name!r} is not active: activate it before training")
        return entry

    @property
    def structure(self) -> Structure:
        return self.entry.structure

    @property
    def plan(self) -> Plan:
        return self.entry.plan

    @property
    def deltas(self) -> Mapping[str, Delta]:
        return self.entry.deltas

    @property
    def bank(self) -> Bank | None:
        return self.entry.bank

    @property
    def copies(self) -> Mapping[str, nn.Module]:
        """The adapter's own copies of whole modules."""
        return self.entry.copies

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained: updates, bank, copies of modules; starts are frozen copies."""
        return list({id(p): p for p in self.entry.parameters()}.values())

    def mix(self, site: str, mixing: Mixing) -> None:
        """Let other adapters at a site be mixed by this one; the mixer is trained and saved with
        it. Raises InputError for an unknown site, StateError for a second mixer there."""
        entry = self.entry
        if site not in entry.deltas:
            raise InputError(f"{self.name!r} has no site {site!r}; {nearest(site, entry.deltas)}")
        plan = entry.plan.choose(site, **{CHOICE: mixing.as_choice()})
        mount(entry.deltas[site], plan.choices[site])
        entry.plan = plan

    def replan(self, plan: Plan) -> None:
        """Make other choices for the same sites. Raises PlanError for other sites."""
        entry = self.entry
        plan.fit(entry.plan.sites)
        link(entry.name, plan, entry.deltas)
        entry.plan = dataclasses.replace(entry.plan, choices=plan.choices, shared=plan.shared)
