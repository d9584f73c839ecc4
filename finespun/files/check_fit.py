"""Whether an adapter from a file fits a model: every tensor looked at before anything changes."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Size, Tensor, nn

from finespun.adapters.deltas import check_scale
from finespun.adapters.keys import Key, of_bank, of_module, of_site, spelt
from finespun.adapters.state import AdapterState
from finespun.contract import Bank, Plan, SiteShape
from finespun.contract.mixing import mount
from finespun.contract.structure import TIE, undrawn
from finespun.errors import BaseMismatch, FileError, TargetError, nearest
from finespun.files.saved import Saved
from finespun.hosts import check_base, modules, register, sites
from finespun.hosts.attach import check_trained
from finespun.hosts.buffers import ROOT, movable
from finespun.hosts.layers.tied import ties
from finespun.hosts.targets import INSERTED
from finespun.storage.blame import DAMAGED
from finespun.storage.memory_limit import bounded

SHOWN = 12


class Wanted(NamedTuple):
    """What one tensor must look like."""

    shape: Size
    floating: bool


class Needed(NamedTuple):
    """All tensors that an adapter must have, its sites, and each site's rank where it has
    factors."""

    tensors: dict[Key, Wanted]
    ranks: dict[str, int]
    places: frozenset[str]
    buffers: dict[tuple[str, str], Wanted]


_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Needed]] = WeakKeyDictionary()
MOST_KNOWN = 16  # forms of a model


def register_saved(model: nn.Module, saved: Saved, force: bool = False) -> list[str]:
    """Make an adapter that was read from files known to the model: only its bytes are held until it
    is activated. Returns notes for the user.

    Raises FileError naming every missing, unknown or ill-shaped tensor, TargetError or PlanError
    where the model lacks a site, BaseMismatch for another base unless `force`. The model is then
    untouched.
    """
    state = settle(model, saved.state)
    check_fit(model, state)
    notes = [*saved.notes, *_check_repeated(model, saved.repeated, force)]
    if state.base is not None:
        notes += check_base(state.base, model, force)
    else:
        notes.append(
            f"{state.name!r} carries no fingerprint of its base: only names and shapes were checked"
        )
    register(model, state)
    return notes


def settle(model: nn.Module, state: AdapterState) -> AdapterState:
    """The adapter with the model's sizes at sites whose size their file does not give: trained rows
    of a table, at all uses of it, and biases without a LoRA beside them. Where such a bias belongs
    to no layer that can be adapted (a norm's), it holds a copy of its module. Raises
    TargetError."""
    plan = state.plan
    waiting = {n for n, c in plan.choices.items() if c.get("open")}
    if not waiting:
        return state
    known, settled = modules(model), dict[str, SiteShape]()
    tensors, trained = dict(state.tensors), list(state.trained)
    choices = {n: {k: v for k, v in c.items() if k != "open"} for n, c in plan.choices.items()}
    for site in plan.sites:
        if site.name not in waiting:
            continue
        if "tokens" not in choices[site.name] and _is_norm(known.get(site.name)):
            own = tensors.pop(Key("site", site.name, "b"))
            tensors |= of_module(site.name, {**_own_state(known[site.name]), "bias": own})
            trained.append(site.name)
            del choices[site.name]
        else:
            settled[site.name] = sites(model, [site.name], state.structure)[site.name].shape
    shapes = tuple(settled.get(s.name, s) for s in plan.sites if s.name in choices)
    tables = [n for n in settled if "tokens" in choices[n]]
    shared = {**plan.shared, TIE: ties(model, tables)} if tables else plan.shared
    plan = Plan(shapes, choices, {k: v for k, v in shared.items() if k != TIE or v})
    return state.with_tensors(tensors, plan, trained)


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors without those that adapters put into it."""
    state = module.state_dict()
    return {k: v for k, v in state.items() if not any(part in INSERTED for part in k.split("."))}


def _is_norm(module: nn.Module | None) -> bool:
    """Whether a module holds vectors alone, a bias among them."""
    if module is None or module._parameters.get("bias") is None or {*module._modules} - {*INSERTED}:
        return False
    return all(p is None or p.dim() < 2 for p in module._parameters.values())


def _check_repeated(model: nn.Module, repeated: Mapping[str, Tensor], force: bool) -> Iterable[str]:
    """Parameters of the base that a file repeats must be the model's."""
    known = modules(model)
    for name, theirs in repeated.items():
        module, _, leaf = name.rpartition(".")
        own = getattr(known.get(module), leaf, None)
        if not isinstance(own, Tensor):
            raise TargetError(
                f"no module with a {leaf} is called {module!r}; {nearest(module, known)}"
            )
        same = own.shape == theirs.shape and torch.allclose(
            own.detach().float().cpu(), theirs.float(), rtol=1e-2, atol=1e-3
        )
        if not same:
            told = (
                f"the file repeats the base's {name!r}, {tuple(theirs.shape)}, which is not the "
                f"model's {tuple(own.shape)}"
            )
            if not force:
                raise BaseMismatch(
                    f"{told}: was it resized or trained? Copy it into the model first, or "
                    "force=True keeps the model's"
                )
            yield told


def check_fit(model: nn.Module, state: AdapterState) -> None:
    """Raise unless the state's plan fits the model and its tensors fit the plan."""
    problems = list(_problems(_needed(model, state), state.tensors))
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise FileError(
            f"adapter {state.name!r} does not fit: " + "; ".join(problems[:SHOWN]) + more
        )


def _needed(model: nn.Module, state: AdapterState) -> Needed:
    """Worked out once for each model and form; the forms that were asked for last are kept."""
    known = _KNOWN.setdefault(model, {})
    found = known.pop(state.form.digest, None) or _work_out(model, state)
    known[state.form.digest] = found
    if len(known) > MOST_KNOWN:
        del known[next(iter(known))]
    return found


def _work_out(model: nn.Module, state: AdapterState) -> Needed:
    structure, plan, present = state.structure, state.plan, modules(model)
    hosts = sites(model, (s.name for s in plan.sites), structure)
    plan.fit(h.shape for h in hosts.values())
    check_trained(model, list(hosts), state.trained)
    found: dict[Key, Tensor] = {}
    ranks: dict[str, int] = {}
    held = _bytes(state.tensors)
    try:
        with bounded(f"adapter {state.name!r}"), torch.no_grad(), undrawn():
            bank: Bank | None = structure.bank(plan)
            if bank is not None:
                found |= of_bank(bank.state_dict())
            asked, forms = _bytes(found), dict[str, tuple[dict[str, Tensor], int | None]]()
            for name, host in hosts.items():
                # One delta stands for all sites of its shape and choice: what a build allocates
                # follows from these alone.
                form = repr((dataclasses.replace(host.shape, name=""), plan.choices[name]))
                if form not in forms:
                    delta = mount(structure.build(host, plan, bank), plan.choices[name])
                    check_scale(name, delta.scale)
                    delta.switch_on()
                    pair = delta.low_rank()
                    forms[form] = delta.state_dict(), None if pair is None else len(pair[0])
                own, rank = of_site(name, forms[form][0]), forms[form][1]
                found |= own
                asked += _bytes(own)
                _check_promised(state.name, held, asked)
                if rank is not None:
                    ranks[name] = rank
    except (*DAMAGED, MemoryError) as error:
        raise FileError(f"adapter {state.name!r}: its plan cannot be built: {error!r}") from error
    for name in state.trained:
        found |= of_module(name, _own_state(present[name]))
    wanted = {key: Wanted(v.shape, v.is_floating_point()) for key, v in found.items()}
    known = {ROOT: model, **present}
    buffers = {
        place: Wanted(value.shape, value.is_floating_point())
        for place in movable(known)
        if (value := known[place[0]]._buffers[place[1]]) is not None
    }
    return Needed(wanted, ranks, frozenset(hosts), buffers)


def _bytes(state: Mapping[Key, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def _check_promised(name: str, held: int, asked: int) -> None:
    """Raise FileError once the plan asks for far more bytes than the file holds, whose parameters
    may be up to eight times narrower: before more is built."""
    if asked > 8 * held + (1 << 20):
        raise FileError(
            f"adapter {name!r}: its plan asks for {asked:,} bytes and more, the file of "
            f"tensors holds {held:,}"
        )


def _problems(needed: Needed, tensors: Mapping[Key, Tensor]) -> Iterable[str]:
    expected = dict(needed.tensors)
    for key in tensors.keys() - expected.keys():
        wanted = _optional(key, needed)
        if wanted is None:
            yield f"{key!r} belongs to nothing; {nearest(str(key), spelt(needed.tensors))}"
        else:
            expected[key] = wanted
            expected |= _with_start(key, needed)
    for key, wanted in sorted(expected.items(), key=lambda item: str(item[0])):
        tensor = tensors.get(key)
        if tensor is None:
            yield f"{key!r} is missing"
        elif tensor.shape != wanted.shape:
            yield f"{key!r} is {tuple(tensor.shape)}, expected {tuple(wanted.shape)}"
        elif tensor.is_floating_point() != wanted.floating:
            yield f"{key!r} is {tensor.dtype}"


def _optional(key: Key, needed: Needed) -> Wanted | None:
    """The form of a tensor that an adapter may have: an exact start, a gate, a mask, a buffer."""
    inner = key.within
    if key.role == "buffer":
        return needed.buffers.get((key.place, key.name))
    if inner in needed.tensors:
        return needed.tensors[inner]
    if inner.role == "gate" and key.owner == "site" and key.place in needed.ranks:
        return Wanted(Size([needed.ranks[key.place]]), True)
    if inner.role == "dead" and key.owner == "site" and key.place in needed.places:
        return Wanted(Size([]), False)
    masked = inner._replace(role="parameter")
    if inner.role == "mask" and masked in needed.tensors:
        return Wanted(needed.tensors[masked].shape, False)
    return None


def _with_start(key: Key, needed: Needed) -> dict[Key, Wanted]:
    """Where one number of an exact start is given, all must be."""
    if key.role != "start":
        return {}
    return {
        other._replace(role="start"): wanted
        for other, wanted in needed.tensors.items()
        if (other.owner, other.place) == (key.owner, key.place)
    }
