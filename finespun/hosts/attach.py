"""Put an adapter's modules into a model, and take them out again."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract import Delta, Plan, Scores, Structure
from finespun.contract.mixing import mount
from finespun.contract.need import MEASURED
from finespun.contract.structure import TIE
from finespun.errors import InputError, StateError, TargetError, nearest
from finespun.hosts import forward_hooks as passes
from finespun.hosts.adapter_set import AdapterSet, Entry, adapter_set_of, alone
from finespun.hosts.factor_cache import FactorCache
from finespun.hosts.insertion import (
    all_hosts,
    children,
    insert_delta,
    put_in_front,
    remove_delta,
    restore_class,
)
from finespun.hosts.layers.block import link
from finespun.hosts.layers.copies import CopyHost
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.kinds import sites
from finespun.hosts.layers.tied import TiedDelta, ties
from finespun.hosts.states import check
from finespun.hosts.targets import modules, unread

BANKS = "finespun_banks"
WRAPPERS = {"OptimizedModule", "DataParallel", "DistributedDataParallel", "FSDPModule",
            "FullyShardedDataParallel"}  # fmt: skip


class Banks(nn.ModuleDict):
    """Adapter name -> its bank. It hands on what it is given, so that an nn.Sequential root, which
    runs all its children, still computes what it did."""

    def forward(self, x: Any) -> Any:
        return x


def hosts_of(model: nn.Module, name: str | None = None) -> dict[str, Host]:
    """Site name -> host of every adapted layer, or of those that hold adapter `name`."""
    return {h.name: h for h in all_hosts(model) if name is None or name in h.deltas()}


def new_entry(
    model: nn.Module,
    name: str,
    structure: Structure,
    targets: Sequence[str],
    trained: Sequence[str] = (),
    scores: Scores | None = None,
    tie: bool = False,
) -> Entry:
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
    entry = Entry(name, structure, plan, tuple(trained))
    register(model, entry)
    try:
        materialise(model, entry)
        _start(entry, scores)
    except BaseException:
        remove(model, name)
        raise
    return entry


def _start(entry: Entry, scores: Scores | None) -> None:
    """Show every delta that starts from its gradient what was measured."""
    for name, delta in entry.deltas.items():
        if scores is not None and type(delta).start_from is not Delta.start_from:
            delta.start_from(torch.as_tensor(scores[name]).to(delta.site.device))


def register(model: nn.Module, entry: Entry) -> None:
    """Make an adapter known to the model; its modules need not exist yet."""
    bad = [c for c in ".:/" if c in entry.name]
    if bad or not entry.name:
        raise InputError(f"adapter name {entry.name!r} must be non-empty and hold none of . : /")
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
    adapter_set = adapter_set_of(model)
    check(adapter_set, "register")
    adapter_set.check_in_place()
    if entry.name in adapter_set.entries:
        raise InputError(
            f"an adapter called {entry.name!r} is already there; choose another name or detach it"
        )
    adapter_set.entries[entry.name] = entry


def check_trained(model: nn.Module, targets: Sequence[str], trained: Sequence[str]) -> None:
    """Raise TargetError unless every trained module exists, is called, and holds no target."""
    known = modules(model)
    for name in trained:
        if name not in known:
            raise TargetError(f"no module is called {name!r} to train; {nearest(name, known)}")
        parent = unread(model, known, name)
        if parent is not None:
            raise TargetError(
                f"{name!r} lies in a {parent}, whose fast path reads its numbers without calling "
                "it: a trained copy would do nothing; train the whole layer or its parent"
            )
        for target in targets:
            if target == name or target.startswith(name + "."):
                raise TargetError(
                    f"{target!r} cannot be adapted inside {name!r}, which is trained whole"
                )


def materialise(model: nn.Module, entry: Entry) -> None:
    """Create the entry's modules and put them into the layers: O(sites), once."""
    if entry.live:
        return
    adapter_set, structure = adapter_set_of(model), entry.structure
    state = {} if entry.flat is None else entry.flat.tensors()
    hosts = sites(model, (s.name for s in entry.plan.sites), structure)
    entry.plan.fit(h.shape for h in hosts.values())
    check_trained(model, list(hosts), entry.trained)
    entry.bank = structure.bank(entry.plan)
    if entry.bank is not None:
        if BANKS not in model._modules:
            model.add_module(BANKS, Banks())
        children(model, BANKS)[entry.name] = entry.bank
    for name, host in hosts.items():
        delta = mount(structure.build(host, entry.plan, entry.bank), entry.plan.choices[name])
        delta.train(host.layer.training)
        delta.__dict__["owner"] = entry.name
        made = entry.flat is None
        if made and host.kind == "embedding" and "low_rank" not in delta.written:
            raise TargetError(
                f"{structure.kind} has no factors: at {name!r} its dense update would hold "
                f"{host.shape.out_features * host.shape.in_features:,} numbers; use lora or lsr"
            )
        host.adapter_set = adapter_set
        insert_delta(host, entry.name, delta)
        entry.deltas[name] = delta
    for other, name in entry.plan.shared.get(TIE, {}).items():
        host = sites(model, [other], structure)[other]
        tied = TiedDelta(host, hosts[name], entry.name).train(host.layer.training)
        tied.__dict__["owner"], host.adapter_set = entry.name, adapter_set
        insert_delta(host, entry.name, tied)
    for name in entry.trained:
        entry.copies[name] = _add_copy(model, name, adapter_set, entry.name)
    if state:
        load_tensors(entry, state)
        entry.flat = None
    replace(model, entry, structure, entry.plan, entry.deltas)


def replace(
    model: nn.Module, entry: Entry, structure: Structure, plan: Plan, deltas: dict[str, Delta]
) -> None:
    """Let the entry hold these deltas, which sit in the layers already; a bank that none of them
    reads any more goes."""
    if entry.bank is not None and all(delta.bank is None for delta in deltas.values()):
        _take_bank(model, entry)
    link(entry.name, plan, deltas)
    entry.structure, entry.plan, entry.deltas = structure, plan, deltas
    forms = deltas and structure.forms_together
    entry.factor_cache = FactorCache(structure, list(deltas.values())) if forms else None


def _add_copy(model: nn.Module, name: str, adapter_set: AdapterSet, adapter: str) -> nn.Module:
    module = modules(model)[name]
    host = module.__dict__.get("_finespun") or CopyHost(module, name, adapter_set)
    if not isinstance(host, CopyHost):
        raise TargetError(f"{name!r} is adapted already and cannot also be trained whole")
    twin = host.original()
    put_in_front(module, host, "copies")[adapter] = twin
    return twin


def tensors_of(entry: Entry) -> dict[str, Tensor]:
    """Every tensor that belongs to the adapter, by its key in files: delta/SITE/NAME, bank/NAME,
    trained/MODULE/NAME. Raises StateError where a process holds only its shard of them."""
    if entry.flat is not None:
        return entry.flat.tensors()
    parts: list[tuple[str, nn.Module]] = [(f"delta/{n}", d) for n, d in entry.deltas.items()]
    if entry.bank is not None:
        parts.append(("bank", entry.bank))
    parts += [(f"trained/{n}", m) for n, m in entry.copies.items()]
    found = {f"{p}/{k}": v for p, m in parts for k, v in m.state_dict().items()}
    if any(hasattr(tensor, "full_tensor") for tensor in found.values()):
        raise StateError(
            f"{entry.name!r} is sharded over processes: gather the model's state with "
            "get_model_state_dict(full_state_dict=True) into a model that is not, and save there"
        )
    return found


def load_tensors(entry: Entry, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the entry's modules. Raises InputError naming the first key that is
    missing, unknown or of another shape; nothing is changed then."""
    starts = {k.partition("/start.")[0] for k in tensors if "/start." in k}
    begun = []
    for name, delta in entry.deltas.items():
        if starts & {"bank", f"delta/{name}"} and delta.origin is None:
            delta.keep_start()
            begun.append(delta)
    try:
        _check_tensors(tensors_of(entry), tensors)
    except InputError:
        holders: list[nn.Module] = [*begun, *(d.bank for d in begun if d.bank is not None)]
        for holder in holders:
            holder._modules.pop("start", None)
        raise
    for prefix, module in _parts(entry):
        own_state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        module.load_state_dict(own_state)


def _check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    extra = {k for k in tensors if k.rsplit("/", 1)[-1].split("_")[0] in ("gate", "alive")}
    extra |= {k for k in tensors if k.rsplit("/", 1)[-1].startswith(("start.gate", "start.alive"))}
    for key in own.keys() - tensors.keys():
        if key.endswith("/alive"):
            continue  # asleep when built, awake in the file
        raise InputError(f"tensor {key!r} is missing; {nearest(key, tensors)}")
    for key in tensors.keys() - own.keys() - extra:
        raise InputError(f"tensor {key!r} belongs to nothing here; {nearest(key, own)}")
    for key, tensor in own.items():
        if key in tensors and tensors[key].shape != tensor.shape:
            found, wanted = tuple(tensors[key].shape), tuple(tensor.shape)
            raise InputError(f"{key!r} is {found}, expected {wanted}")


def _parts(entry: Entry) -> Iterator[tuple[str, nn.Module]]:
    for name, delta in entry.deltas.items():
        yield f"delta/{name}/", delta
    if entry.bank is not None:
        yield "bank/", entry.bank
    for name, module in entry.copies.items():
        yield f"trained/{name}/", module


@alone
def remove(model: nn.Module, name: str) -> None:
    """Forget an adapter and restore every module that carries none; the last one restores the
    model itself."""
    adapter_set = adapter_set_of(model)
    entry = adapter_set[name]
    check(adapter_set, "detach", name)
    adapter_set.active = tuple((n, w) for n, w in adapter_set.active if n != name)
    take_out(model, entry)
    del adapter_set.entries[name]
    if not adapter_set.entries:
        for hook in model.__dict__.pop("_finespun_hooks"):
            hook.remove()
        del model.__dict__["_finespun_adapters"]


def take_out(model: nn.Module, entry: Entry) -> None:
    """Take an adapter's modules out of the layers and forget them."""
    for host in hosts_of(model, entry.name).values():
        remove_delta(host, entry.name)
    known = modules(model)
    for name in entry.trained:
        held = known[name]._modules.get("copies")
        if isinstance(held, nn.ModuleDict) and entry.name in held:
            del held[entry.name]
            if not held:
                restore_class(known[name], "copies")
    _take_bank(model, entry)
    entry.deltas, entry.copies, entry.factor_cache = {}, {}, None


def _take_bank(model: nn.Module, entry: Entry) -> None:
    banks = model._modules.get(BANKS)
    if isinstance(banks, nn.ModuleDict) and entry.name in banks:
        del banks[entry.name]
        if not banks:
            del model._modules[BANKS]
    entry.bank = None
