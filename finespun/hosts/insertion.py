"""Seating: putting modules of adapters into the layers of a model, and taking them out."""

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

from finespun.contract import Delta
from finespun.errors import StateError, TargetError
from finespun.hosts.layers.copies import CopyHost
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.layer import OWN_FORWARD, Adapted, adapted_class, plain_class
from finespun.hosts.layers.slices import SliceHost, SlicesHost
from finespun.hosts.paths import fixed_columns
from finespun.hosts.targets import modules

HOOKED = "_old_forward"  # where accelerate's hooks keep the forward that they call


class Beside(nn.ModuleDict):
    """Adapter name -> its module. It hands on what it is given, so that an nn.Sequential, which
    runs all its children, still computes what it did."""

    def forward(self, x: Any) -> Any:
        return x


def host_at(module: nn.Module, part: str = "") -> Host | None:
    """The host that stands beside a module, or beside one of its parts; None where there is none.

    Raises TargetError where whole and parts, or update and trained copy, would meet.
    """
    own = module.__dict__.get("_finespun")
    if isinstance(own, CopyHost):
        raise TargetError(f"{own.name!r} is trained whole by another adapter: no delta fits")
    if isinstance(own, SlicesHost):
        if not part:
            raise TargetError(f"parts of {own.whole.name!r} are adapted: name parts, not the whole")
        return own.parts.get(part)
    if isinstance(own, Host) and part:
        raise TargetError(f"{own.name!r} is adapted as a whole: its part {part!r} cannot be")
    return own


def all_hosts(model: nn.Module) -> Iterator[Host]:
    """Every host of the model, parts one by one."""
    for module in modules(model).values():
        own = module.__dict__.get("_finespun")
        if isinstance(own, Host):
            yield own
        elif isinstance(own, SlicesHost):
            yield from own.parts.values()


def insert_delta(host: Host, adapter: str, delta: Delta) -> None:
    """Put a delta into its layer; the adapted class comes in front with the first one."""
    host_at(host.layer, host.part if isinstance(host, SliceHost) else "")
    delta.__dict__["columns"] = fixed_columns(type(host), delta)
    if not isinstance(host, SliceHost):
        put_in_front(host.layer, host, "deltas")[adapter] = delta
        return
    beside = host.layer.__dict__.get("_finespun") or SlicesHost(host.whole)
    if host.part not in beside.parts:
        beside.add(host)
    parts = put_in_front(host.layer, beside, "deltas")
    if host.part not in parts:
        parts[host.part] = nn.ModuleDict().train(host.layer.training)
    host.deltas()[adapter] = delta


def remove_delta(host: Host, adapter: str) -> None:
    """Take a delta out; the last one restores the layer's class."""
    held = host.deltas()
    if adapter in held:
        del held[adapter]
    if held:
        return
    if isinstance(host, SliceHost):
        beside = host.layer.__dict__["_finespun"]
        del beside.parts[host.part], children(host.layer, "deltas")[host.part]
        if beside.parts:
            return
    restore_class(host.layer, "deltas")


def put_in_front(module: nn.Module, host: Any, child: str) -> nn.ModuleDict:
    """Put the adapted class in front, once, and return the dictionary for the adapters' modules."""
    if not isinstance(module, Adapted):
        module._modules[child] = Beside().train(module.training)
        module.__dict__["_finespun"] = host
        module.__class__ = adapted_class(type(module))
        _take_forward(module)
    return children(module, child)


def _take_forward(module: nn.Module) -> None:
    """A forward on the object itself hides that of its class: it becomes the base. Where accelerate
    put it there, the adapted forward goes inside, so that it sees weights that are loaded and
    inputs that were moved."""
    own = module.__dict__
    if HOOKED in own:
        own[OWN_FORWARD], own[HOOKED] = own[HOOKED], MethodType(Adapted.forward, module)
    elif "forward" in own:
        own[OWN_FORWARD] = own.pop("forward")


def _give_forward(module: nn.Module) -> None:
    """Put back what `_take_forward` took; hooks that came later call the class's own forward."""
    own = module.__dict__
    key = HOOKED if HOOKED in own else "forward"
    if OWN_FORWARD in own:
        own[key] = own.pop(OWN_FORWARD)
    elif getattr(own.get(key), "__func__", None) is Adapted.forward:
        own[key] = MethodType(plain_class(module).forward, module)


def restore_class(module: nn.Module, child: str) -> None:
    """Give the module its own class back. Raises StateError where another class came in front."""
    if type(module).__mro__[1] is not Adapted:
        raise StateError(
            f"a {type(module).__name__} cannot be given its own class back: "
            f"{type(module).__mro__[0].__name__} was put in front of it after it was adapted"
        )
    _give_forward(module)
    module.__class__ = plain_class(module)
    del module._modules[child]
    del module.__dict__["_finespun"]


def children(module: nn.Module, child: str) -> nn.ModuleDict:
    """A module's dictionary of adapters' modules."""
    found = module._modules[child]
    if not isinstance(found, nn.ModuleDict):
        raise StateError(f"{type(module).__name__} has a child {child!r} of its own")
    return found
