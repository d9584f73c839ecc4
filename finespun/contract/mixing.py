"""How several adapters at one site become one output: experts behind a router, gated fusion.

A mixer is a module that one adapter holds at a site, as the child `mixer` of its delta: trained and
saved with it, there at inference too. The plan's choice `mixer` of the site says how it is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finespun.contract.delta import Delta
from finespun.contract.method import Method, registering
from finespun.contract.site import Site
from finespun.contract.training import Member
from finespun.errors import InputError, PlanError, StateError, nearest

CHOICE = "mixer"


class MixerModule(nn.Module):
    """`forward(x, base, members)` is the layer's output for x (..., in), where `base` (..., out) is
    the base's and `members[adapter]` gives an adapter's change ΔW x for any subset of the rows of
    x, its strength included. `members` names those that are mixed, active or not."""

    members: tuple[str, ...] = ()

    def forward(self, x: Tensor, base: Tensor, members: Mapping[str, Member]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how it mixes")


@dataclass(frozen=True, kw_only=True)
class Mixing(Method):
    """The options of one way to mix; subclass it beside a MixerModule."""

    members: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.members or len(set(self.members)) != len(self.members):
            raise InputError(f"members={list(self.members)} must name adapters, each once")

    def build(self, site: Site) -> MixerModule:
        """The module of one site, as it starts."""
        raise NotImplementedError(f"{type(self).__name__} must build its module")

    def as_choice(self) -> dict[str, Any]:
        """What the plan keeps of it."""
        return {"kind": self.kind, **self.options()}


MIXINGS: dict[str, type[Mixing]] = {}
register = registering(MIXINGS, "a mixing")


def mount(delta: Delta, choice: Mapping[str, Any]) -> Delta:
    """The delta, with the mixer that the plan's choices for its site name, if any; it can be merged
    no more. Raises PlanError for one that is not known, StateError where one is there already."""
    found = choice.get(CHOICE)
    if found is None:
        return delta
    kind = found.get("kind") if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or kind not in MIXINGS:
        raise PlanError(f"no mixer is called {kind!r}; {nearest(str(kind), MIXINGS)}")
    if CHOICE in delta._modules:
        raise StateError(f"{delta.site.shape.name!r} has a mixer already; one fits at a site")
    options = {key: value for key, value in found.items() if key != "kind"}
    mixing = MIXINGS[kind].from_options(**options)
    _hang(delta, mixing.build(delta.site).to(delta.site.device), mixing.members)
    return delta


def carry(old: Delta, new: Delta) -> None:
    """Let a delta that takes another's place have its mixer, the very module."""
    mixer = old._modules.get(CHOICE)
    if isinstance(mixer, MixerModule):
        _hang(new, mixer, mixer.members)


def _hang(delta: Delta, mixer: MixerModule, members: tuple[str, ...]) -> None:
    mixer.members = members
    delta.add_module(CHOICE, mixer.train(delta.training))
    delta.__dict__["mergeable"] = False
