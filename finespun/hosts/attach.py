"""Put an adapter's modules into a model, and take them out again."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from finespun.adapters.compact import compact as compacted
from finespun.adapters.keys import Key
from finespun.adapters.state import AdapterState
from finespun.contract import Delta, Plan, Scores, Structure
from finespun.contract.mixing import mount
from finespun.contract.need import MEASURED
from finespun.contract.structure import TIE, undrawn
from finespun.errors import InputError, StateError, TargetError, nearest
from finespun.hosts import forward_hooks as passes
from finespun.hosts.adapter_set import AdapterSet, adapter_set_of, alone
from finespun.hosts.attached import Attached
from finespun.hosts.buffers import ROOT
from finespun.hosts.factor_cache import FactorCache
from finespun.hosts.following import follow, leave_alone
from finespun.hosts.insertion import (
    Beside,
    all_hosts,
    children,
    insert_delta,
    put_in_front,
    remove_delta,
    restore_class,
)
from finespun.hosts.layers.block import link
from finespun.hosts.layers.copies import CopyHost, widened
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.kinds import sites
from finespun.hosts.layers.tied import TiedDelta, ties
from finespun.hosts.states import check
from finespun.hosts.targets import modules, unread

BANKS = "finespun_banks"
WRAPPERS = {"OptimizedModule", "DataParallel", "DistributedDataParallel", "FSDPModule",
            "FullyShardedDataParallel"}  # fmt: skip


def hosts_of(model: nn.Module, name: str | None = None) -> dict[str, Host]:
    """Site name -> host of every adapted layer, or of those that hold adapter `name`."""
    return {h.name: h for h in all_hosts(model) if name is None or name in h.deltas()}


def new_adapter(
    model: nn.Module,
    name: str,
    structure: Structure,
    targets: Sequence[str],
    trained: Sequence[str] = (),
    scores: Scores | None = None,
    tie: bool = False,
) -> Attached:
    """Plan, build and attach a new adapter; on any error the model is left as it was."""
    adapter_set = model.__dict__.get("_finespun_adapters")
    if isinstance(adapter_set, AdapterSet):
        check(adapter_set, "adapt")
    if scores is not None and not structure.needs & MEASURED:
        raise InputError(f"{structure.kind} with these options chooses nothing by scores")
    found = list(sites(model, targets, structure).values())
    check_trained(model, targets, trained)
    plan = structure.plan(found, scores)
    if tie:
        plan = dataclasses.replace(plan, shared={**plan.shared, TIE: ties(model, list(targets))})
    _enrol(model, name, None)
    try:
        made = _insert(model, Attached(name, structure, plan, tuple(trained)))
        _start(made, scores)
    except BaseException:
        remove(model, name)
        raise
    return made


def _start(made: Attached, scores: Scores | None) -> None:
    """Show every delta that starts from its gradient what was measured."""
    for name, delta in made.deltas.items():
        if scores is not None and type(delta).start_from is not Delta.start_from:
            delta.start_from(torch.as_tensor(scores[name]).to(delta.site.device))


def register(model: nn.Module, state: AdapterState) -> None:
    """Make an adapter known to the model; its modules need not exist yet."""
    _enrol(model, state.name, state.shared())


def _enrol(model: nn.Module, name: str, state: AdapterState | None) -> None:
    bad = [c for c in ".:/" if c in name]
    if bad or not name:
        raise InputError(f"adapter name {name!r} must be non-empty and hold none of . : /")
    if "_finespun_adapters" not in model.__dict__:
        wrapped = {c.__name__ for c in type(model).__mro__} & WRAPPERS
        if wrapped:
            raise StateError(
                f"the model is wrapped by {', '.join(sorted(wrapped))} already: adapt or load "
                "before that, so that its new parameters are seen there and keep their names"
            )
        model.__dict__["_finespun_adapters"] = AdapterSet()
        model.__dict__["_finespun_hooks"] = (
            model.register_forward_pre_hook(passes.enter, with_kwargs=True),
            model.register_forward_hook(passes.leave, always_call=True),
        )
        follow(model)
    adapter_set = adapter_set_of(model)
    check(adapter_set, "register")
    if name in adapter_set.states:
        raise InputError(
            f"an adapter called {name!r} is already there; choose another name or detach it"
        )
    adapter_set.states[name] = state


def check_trained(model: nn.Module, targets: Sequence[str], trained: Sequence[str]) -> None:
    """Raise TargetError unless every trained module exists, is called, and holds no target."""
    known = modules(model)
    for name in trained:
        if name not in known:
            raise TargetError(f"no module is called {name!r} to train; {nearest(name, known)}")
        parent = unread(model, known, name)
        if parent is not None:
            raise TargetError(
                f"{name!r} lies in a {parent}, whose fast path reads its parameters without "
                "calling it: a trained copy would do nothing; train the whole layer or its parent"
            )
        for target in targets:
            if target == name or target.startswith(name + "."):
                raise TargetError(
                    f"{target!r} cannot be adapted inside {name!r}, which is trained whole"
                )


def materialise(model: nn.Module, name: str) -> Attached:
    """The modules of an adapter, made and put into the layers where it sleeps: O(sites), once. On
    any error it sleeps on, and the model is left as it was. Raises InputError where none has this
    name."""
    adapter_set = adapter_set_of(model)
    found = adapter_set[name]
    if isinstance(found, Attached):
        return found
    with adapter_set.guard():
        made = Attached.of(found)
        try:
            with undrawn():
                return _insert(model, made, found.tensors)
        except BaseException:
            take_out(model, made)
            raise


def _insert(
    model: nn.Module, made: Attached, tensors: Mapping[Key, Tensor] | None = None
) -> Attached:
    """Build the modules and put them into the layers, with these tensors where there are some."""
    adapter_set, structure = adapter_set_of(model), made.structure
    hosts = sites(model, (s.name for s in made.plan.sites), structure)
    made.plan.fit(h.shape for h in hosts.values())
    check_trained(model, list(hosts), made.trained)
    adapter_set.attached[made.name] = made
    made.bank = structure.bank(made.plan)
    if made.bank is not None:
        if BANKS not in model._modules:
            model.add_module(BANKS, Beside())
        children(model, BANKS)[made.name] = made.bank
    for name, host in hosts.items():
        delta = mount(structure.build(host, made.plan, made.bank), made.plan.choices[name])
        delta.train(host.layer.training)
        delta.__dict__["owner"] = made.name
        if tensors is None and host.kind == "embedding" and "low_rank" not in delta.written:
            raise TargetError(
                f"{structure.kind} has no factors: at {name!r} its dense update would hold "
                f"{host.shape.out_features * host.shape.in_features:,} parameters; use lora or lsr"
            )
        host.adapter_set = adapter_set
        insert_delta(host, made.name, delta)
        made.deltas[name] = delta
    for other, name in made.plan.shared.get(TIE, {}).items():
        host = sites(model, [other], structure)[other]
        tied = TiedDelta(host, hosts[name], made.name).train(host.layer.training)
        tied.__dict__["owner"], host.adapter_set = made.name, adapter_set
        insert_delta(host, made.name, tied)
    for name in made.trained:
        made.copies[name] = _add_copy(model, name, adapter_set, made.name)
    made.buffers = adapter_set.buffers
    if tensors is not None:
        watch(model, made, tensors)
        made.load(tensors)
    replace(model, made, structure, made.plan, made.deltas)
    return made


def watch(model: nn.Module, made: Attached, tensors: Mapping[Key, Tensor]) -> None:
    """Keep the base's buffers aside where these tensors of an adapter have others. Raises
    InputError where the model has none."""
    places = [(key.place, key.name) for key in tensors if key.role == "buffer"]
    if places and made.buffers is not None:
        made.buffers.watch({ROOT: model, **modules(model)}, places)


def own_buffers(model: nn.Module, name: str) -> None:
    """Adapter `name` will be trained: what training moves in the buffers of the base is its own."""
    adapter_set = adapter_set_of(model)
    adapter_set.buffers.begin(name, {ROOT: model, **modules(model)})
    adapter_set.settle_buffers()


def replace(
    model: nn.Module, made: Attached, structure: Structure, plan: Plan, deltas: dict[str, Delta]
) -> None:
    """Let an adapter hold these deltas, which sit in the layers already; a bank that none of them
    reads any more goes."""
    if made.bank is not None and all(delta.bank is None for delta in deltas.values()):
        _take_bank(model, made)
    link(made.name, plan, deltas)
    made.structure, made.plan, made.deltas = structure, plan, deltas
    forms = deltas and structure.forms_together
    made.factor_cache = FactorCache(structure, list(deltas.values())) if forms else None


def compact(model: nn.Module, name: str) -> None:
    """Remove what was switched off in an adapter, as `adapters.compact` does; shapes change."""
    made = materialise(model, name)
    structure, plan, small = compacted(made.structure, made.plan, made.deltas)
    trained = any(p.requires_grad for p in made.parameters())
    places = hosts_of(model, name)
    for site in made.deltas.keys() - small.keys():
        remove_delta(places[site], name)
    for site, delta in small.items():
        delta.__dict__["owner"] = name
        delta.train(made.deltas[site].training)
        for parameter in delta.trained_parameters():
            parameter.requires_grad_(trained)
        insert_delta(places[site], name, delta)
    replace(model, made, structure, plan, small)


def _add_copy(model: nn.Module, name: str, adapter_set: AdapterSet, adapter: str) -> nn.Module:
    module = modules(model)[name]
    host = module.__dict__.get("_finespun") or CopyHost(module, name, adapter_set)
    if not isinstance(host, CopyHost):
        raise TargetError(f"{name!r} is adapted already and cannot also be trained whole")
    twin = widened(host.original())
    put_in_front(module, host, "copies")[adapter] = twin
    return twin


@alone
def remove(model: nn.Module, name: str) -> None:
    """Forget an adapter and restore every module that carries none; the last one restores the
    model itself."""
    adapter_set = adapter_set_of(model)
    adapter_set.check_known(name)
    check(adapter_set, "detach", name)
    adapter_set.active = tuple((n, w) for n, w in adapter_set.active if n != name)
    adapter_set.merged = {n: w for n, w in adapter_set.merged.items() if n != name}
    forget(model, name)


def forget(model: nn.Module, name: str) -> None:
    """Take out an adapter that neither acts nor is merged."""
    adapter_set = adapter_set_of(model)
    if name in adapter_set.attached:
        take_out(model, adapter_set.attached[name])
    del adapter_set.states[name]
    adapter_set.settle_buffers()
    if not adapter_set.states:
        adapter_set.buffers.put({})
        leave_alone(model)
        for hook in model.__dict__.pop("_finespun_hooks"):
            hook.remove()
        del model.__dict__["_finespun_adapters"]


def take_out(model: nn.Module, made: Attached) -> None:
    """Take an adapter's modules out of the layers and forget them."""
    for host in hosts_of(model, made.name).values():
        remove_delta(host, made.name)
    known = modules(model)
    for name in made.copies:
        held = known[name]._modules.get("copies")
        if isinstance(held, nn.ModuleDict) and made.name in held:
            del held[made.name]
            if not held:
                restore_class(known[name], "copies")
    _take_bank(model, made)
    made.deltas, made.copies, made.factor_cache = {}, {}, None
    adapter_set_of(model).buffers.forget(made.name)
    adapter_set_of(model).attached.pop(made.name, None)


def _take_bank(model: nn.Module, made: Attached) -> None:
    banks = model._modules.get(BANKS)
    if isinstance(banks, nn.ModuleDict) and made.name in banks:
        del banks[made.name]
        if not banks:
            del model._modules[BANKS]
    made.bank = None
