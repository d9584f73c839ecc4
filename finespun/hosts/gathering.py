"""Moving the chosen units of coupled layers to the front: the model computes what it did."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finespun.contract import Delta
from finespun.errors import StateError
from finespun.hosts.adapter_set import adapter_set_of
from finespun.hosts.attached import Attached
from finespun.hosts.coupling import Family, family, width
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.kinds import sites
from finespun.hosts.layers.layer import plain_class
from finespun.hosts.layers.quantised import quantised
from finespun.hosts.targets import modules


@contextmanager
def gathered(model: nn.Module, name: str = "default") -> Iterator[None]:
    """Inside, the units that an adapter of whole lines (S2FT) trains stand first in every layer of
    their blocks, so that its slices are contiguous.

    P W1 and W2 Pᵀ take the place of all W1 that write and W2 that read the hidden features, biases
    included: the model computes the same up to the order of sums. At the end, errors included,
    every parameter is back in its place, bit for bit. Adapters are not saved, exported, merged or
    added meanwhile. Blocks whose layers are not known, or that train query heads apart from their
    keys and values, stay as they are. Raises StateError where the model has other adapters, and for
    a block with quantised or shared weights or other ones that may follow the same features.
    Source: arXiv 2412.06289.
    """
    adapter_set = adapter_set_of(model)
    adapter = adapter_set[name]
    busy = adapter_set.merged or adapter_set.gathered or len(adapter_set.states) > 1
    if busy or not isinstance(adapter, Attached):
        raise StateError(
            f"only {name!r}, active and not merged, may be on the model while its units are "
            f"gathered; there are {', '.join(adapter_set.states)}"
        )
    moves = list(_moves(model, adapter))
    with ExitStack() as undo:
        adapter_set.gathered = name
        undo.callback(setattr, adapter_set, "gathered", None)
        for move in moves:
            undo.callback(move.apply, move.order.argsort())
            move.apply(move.order)
            for delta in move.deltas:
                lines = delta.lines
                if lines is not None:
                    undo.callback(delta.stand, lines)
                    delta.stand(torch.arange(len(lines)))
        yield


@dataclass(frozen=True)
class _Move:
    """The layers of one block, the deltas on them, and the order in which its units shall stand."""

    writers: tuple[Host, ...]
    reader: Host
    deltas: tuple[Delta, ...]
    order: Tensor

    @torch.no_grad()
    def apply(self, order: Tensor) -> None:
        for host in self.writers:
            stored = host.stored()
            for tensor in (host.read(stored), host.bias()):
                if tensor is not None:
                    reorder(tensor, 0, order)
        reorder(self.reader.read(self.reader.stored()), 1, order)


def reorder(tensor: Tensor, dim: int, order: Tensor) -> None:
    """Move the units of one dimension in place: unit i becomes what unit order[i] was."""
    size = tensor.shape[dim] // len(order)
    places = (order[:, None] * size + torch.arange(size)).flatten().to(tensor.device)
    tensor.copy_(tensor.index_select(dim, places))


def _moves(model: nn.Module, adapter: Attached) -> Iterator[_Move]:
    known = modules(model)
    blocks: dict[str, list[Delta]] = {}
    found: dict[str, Family] = {}
    for site, delta in adapter.deltas.items():
        own, choice = family(known, site), adapter.plan.choices[site]
        if delta.lines is None:
            raise StateError(f"{adapter.structure.kind} chooses no units: there are none to gather")
        coupling = delta.site.coupling
        if own is None or coupling is None:
            continue
        if (choice["side"], choice["of"]) != (coupling.side, coupling.units):
            continue
        found[own.block] = own
        blocks.setdefault(own.block, []).append(delta)
    for block, deltas in blocks.items():
        own = found[block]
        names = (*own.writers, own.reader)
        choice = adapter.plan.choices[deltas[0].site.shape.name]
        _check(model, known, own, choice["of"], adapter)
        hosts = sites(model, names, adapter.structure)
        first = torch.zeros(choice["of"], dtype=torch.bool)
        first[choice["units"]] = True
        order = torch.argsort(first, descending=True, stable=True)
        yield _Move(tuple(hosts[n] for n in own.writers), hosts[own.reader], tuple(deltas), order)


def _check(
    model: nn.Module, known: Mapping[str, nn.Module], own: Family, units: int, adapter: Attached
) -> None:
    """Raise StateError unless moving these layers' units leaves the model what it is."""
    names = [n.partition(":")[0] for n in (*own.writers, own.reader)]
    layers = [known[n] for n in names]
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for name, layer in zip(names, layers):
        if quantised(layer):
            raise StateError(f"{name!r} is quantised: its parameters cannot be moved")
        if any(uses[id(p)] > 1 for p in layer._parameters.values() if p is not None):
            raise StateError(
                f"{name!r} shares parameters with another module: they cannot be moved"
            )
        if any(f"{name}.".startswith(f"{t}.") for t in adapter.trained):
            raise StateError(f"{name!r} is trained whole as a copy: it cannot be moved")
    core = plain_class(known.get(own.core, model))
    members = tuple(n.removeprefix(own.core).lstrip(".") + "." for n in names)
    sizes = {width(known, n, "out") for n in own.writers} | {units}
    for other in (m for m in (model, *known.values()) if plain_class(m) is core):
        for name, parameter in other.named_parameters():
            if not name.startswith(members) and (sizes - {1}) & {*parameter.shape}:
                raise StateError(
                    f"{name!r} {tuple(parameter.shape)} in a {core.__name__} may belong to the "
                    f"units of {own.block!r}: they are not moved without it"
                )
