"""Which host serves which kind of module."""

from collections.abc import Iterable

from torch import nn

from finespun.contract import Structure
from finespun.errors import TargetError, an, nearest
from finespun.hosts.adapter_set import AdapterSet
from finespun.hosts.coupling import couple
from finespun.hosts.insertion import host_at
from finespun.hosts.layers.block import BlockHost
from finespun.hosts.layers.conv import ConvHost
from finespun.hosts.layers.embedding import EmbeddingHost
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.layer import plain_class
from finespun.hosts.layers.linear import LinearHost, QuantisedHost, TransposedHost
from finespun.hosts.layers.quantised import quantised
from finespun.hosts.layers.slices import SliceHost
from finespun.hosts.targets import modules, unread

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
ADAPTABLE = "nn.Linear, Conv1d to Conv3d, Embedding, transformers' Conv1D and quantised linears"


def sites(model: nn.Module, targets: Iterable[str], structure: Structure) -> dict[str, Host]:
    """The hosts of modules and, as NAME:PART, of slices of fused ones, by target; made but not yet
    attached unless the module is adapted already.

    Raises TargetError for modules that cannot carry a delta, or would carry it in vain.
    """
    known, adapter_set = modules(model), model.__dict__.get("_finespun_adapters") or AdapterSet()
    found = {t: _site(model, known, adapter_set, t, structure) for t in targets}
    for host in found.values():
        host.coupling = couple(model, known, host)
    return found


def _site(
    model: nn.Module,
    known: dict[str, nn.Module],
    adapter_set: AdapterSet,
    target: str,
    structure: Structure,
) -> Host:
    name, _, part = target.partition(":")
    if name not in known:
        raise TargetError(f"no module is called {name!r}; {nearest(name, known)}")
    module = known[name]
    own = host_at(module, part)
    if own is not None and own.adapter_set is not adapter_set:
        raise TargetError(
            f"{name!r} is adapted already, as {own.name!r} of a module inside or around this one: "
            "adapt everything through the same module"
        )
    if own is not None:
        return own
    parent = unread(model, known, name)
    if parent is not None:
        raise TargetError(
            f"{name!r} lies in a {parent}, whose fast path reads the weight without calling the "
            "layer: an adapter there would do nothing"
        )
    if structure.site_kind == "block" and not _is_layer(module):
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            raise TargetError(
                f"{name!r} is {an(plain_class(module).__name__)}, which would run its adapters as "
                "layers: name the blocks inside it, or wrap it in a module of its own"
            )
        return BlockHost(module, name, adapter_set)
    host = _host(module, name, adapter_set)
    if not part:
        return host
    if not isinstance(host, LinearHost) or isinstance(host, QuantisedHost):
        raise TargetError(f"{name!r} is no plain linear layer: it has no parts such as {part!r}")
    return SliceHost(host, part)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a single layer, around which a bypass is an update of its weight."""
    plain = issubclass(plain_class(module), LAYERS)
    return plain or (plain_class(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _check_weight(module: nn.Module, name: str) -> None:
    """Raise TargetError for a layer whose weight is no parameter, or is quantised past reading."""
    if "weight" not in module._parameters:
        raise TargetError(
            f"{name!r} computes its weight anew in every forward pass (weight_norm, pruning, "
            "parametrize): make it a parameter first, as remove_parametrizations does"
        )
    if quantised(module) and not isinstance(module, nn.Linear):
        raise TargetError(
            f"{name!r} is a quantised {plain_class(module).__name__}; of quantised layers only "
            "linear ones can be adapted"
        )


def _host(module: nn.Module, name: str, adapter_set: AdapterSet) -> Host:
    cls = plain_class(module)
    if _is_layer(module):
        _check_weight(module, name)
    if issubclass(cls, nn.Linear):
        return (QuantisedHost if quantised(module) else LinearHost)(module, name, adapter_set)
    if cls.__name__ == "Conv1D" and hasattr(module, "nf"):
        return TransposedHost(module, name, adapter_set)
    if issubclass(cls, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvHost(module, name, adapter_set)
    if issubclass(cls, nn.Embedding):
        return EmbeddingHost(module, name, adapter_set)
    raise TargetError(
        f"{name!r} is a {cls.__module__}.{cls.__name__}; what can be adapted: {ADAPTABLE}"
    )
