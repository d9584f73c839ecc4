"""The end of adapters in a model: it goes on computing what it does, as a plain model again."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from finespun.errors import InputError, StateError
from finespun.hosts.adapter_set import AdapterSet, adapter_set_of, alone
from finespun.hosts.attach import forget, hosts_of, materialise, remove
from finespun.hosts.attached import Attached
from finespun.hosts.freezing import give_back
from finespun.hosts.merging import merge, unmerge
from finespun.hosts.states import State, check
from finespun.hosts.targets import modules

SIMPLE = (bool, int, float, str)  # what a module says of itself: out_features, eps


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter out and give back what it froze; after the last one the model is what it was.
    Raises StateError while it is merged, serves rows, or the model is inside `disabled`."""
    remove(model, name)
    adapter_set = model.__dict__.get("_finespun_adapters")
    stay = {} if adapter_set is None else adapter_set.attached
    names = () if adapter_set is None else adapter_set.states
    give_back(model, name, {n: stay[n].parameters() if n in stay else [] for n in names})


@alone
def bake(
    model: nn.Module, wanted: str | Sequence[str] | Mapping[str, float] | None = None
) -> nn.Module:
    """Fold adapters into the base for good and return the model, the same object: W0 + Σ c_i ΔW_i
    in the weights, trained modules and moved buffers in the place of the base's own, classes and
    keys plain. It is ready for `save_pretrained`, an export, or another adapter.

    `wanted` are names with weights, or names, which keep the weight with which they act; None is
    all that acts now. The base is gone then.
    Trained modules and buffers are put in whole, whatever the weight, in the dtype of the base; of
    what is merged and not active neither acts, so that None leaves them out.
    Raises StateError, with nothing changed, where other adapters would be left behind, an update
    cannot be merged, a weight is quantised, or two adapters have their own of one module.
    """
    adapter_set = adapter_set_of(model)
    merged = dict(adapter_set.merged)
    acting = {**dict(adapter_set.active), **merged}
    weights = acting if wanted is None else dict(adapter_set.weights(wanted))
    if not isinstance(wanted, Mapping):
        weights = {name: acting.get(name, c) for name, c in weights.items()}
    if not weights:
        raise InputError("no adapter acts, so that there is nothing to bake; name one")
    others = sorted(adapter_set.states.keys() - weights.keys())
    asked: list[State] = ["leaves others behind"] if others else []
    if merged.items() - weights.items():
        asked.append("leaves merged ones out")
    check(adapter_set, "bake", asked=asked, others=others)
    made = [materialise(model, name) for name in weights]
    whole = dict(adapter_set.active) if wanted is None else weights
    copies = _copies(model, [one for one in made if one.name in whole])
    stands = adapter_set.buffers.choice(whole)
    _check_writable(model, weights)
    if weights != merged:
        _fold(model, weights, merged)
    adapter_set.buffers.put(stands)
    adapter_set.buffers.keep()
    _end(model, adapter_set)
    for module, twin in copies:
        _move(module, twin)
    return model


def _copies(model: nn.Module, made: Sequence[Attached]) -> list[tuple[nn.Module, nn.Module]]:
    """(module, the copy that takes its place). Raises StateError where there are two, or where the
    module's parameters are used elsewhere too."""
    known, owner = modules(model), dict[str, str]()
    found = []
    for adapter in made:
        for name, twin in adapter.copies.items():
            if owner.setdefault(name, adapter.name) != adapter.name:
                raise StateError(
                    f"{owner[name]!r} and {adapter.name!r} each have their own {name!r}: bake one"
                )
            own = {id(p) for p in known[name].parameters()}
            inside = {id(m) for m in known[name].modules()}
            for place, module in known.items():
                shared = own & {id(p) for p in module._parameters.values()}
                if shared and id(module) not in inside:
                    raise StateError(
                        f"{name!r} is trained as a copy and shares its weight with {place!r}, "
                        "which it would not follow: untie them (tie_word_embeddings=False) first"
                    )
            found.append((known[name], twin))
    return found


def _check_writable(model: nn.Module, weights: Mapping[str, float]) -> None:
    for name, host in hosts_of(model).items():
        if not host.writable and any(adapter in host.held() for adapter in weights):
            raise StateError(
                f"{name!r} is quantised and would remain quantised in a plain model: load the base "
                "in full precision to bake adapters into it"
            )


def _fold(model: nn.Module, weights: dict[str, float], merged: dict[str, float]) -> None:
    """Merge these; on any error the model is merged as before."""
    if merged and not adapter_set_of(model).for_good:
        unmerge(model)
    try:
        merge(model, weights)
    except BaseException:
        if merged and not adapter_set_of(model).merged:
            merge(model, merged)
        raise


def _end(model: nn.Module, adapter_set: AdapterSet) -> None:
    names = list(adapter_set.states)
    adapter_set.active, adapter_set.merged, adapter_set.kept = (), {}, None
    for name in names:
        forget(model, name)
    for name in names:
        give_back(model, name, {})


@torch.no_grad()
def _move(module: nn.Module, twin: nn.Module) -> None:
    """Let a module hold what its copy held, in its own dtypes; it stays the object it is."""
    for one, other in _pairs(module, twin):
        for key, value in other.__dict__.items():
            if isinstance(value, SIMPLE) and key != "training" and key in one.__dict__:
                one.__dict__[key] = value
        for key, parameter in other._parameters.items():
            old = one._parameters.get(key)
            if parameter is not None:
                dtype = parameter.dtype if old is None else old.dtype
                grows = True if old is None else old.requires_grad
                one._parameters[key] = nn.Parameter(parameter.detach().to(dtype), grows)
        for key, buffer in other._buffers.items():
            was = one._buffers.get(key)
            one._buffers[key] = buffer if was is None or buffer is None else buffer.to(was.dtype)


def _pairs(module: nn.Module, twin: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    theirs = dict(twin.named_modules())
    for name, one in module.named_modules():
        yield one, theirs[name]
