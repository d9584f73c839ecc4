"""Whether an adapter from a file fits a model: every tensor looked at before anything changes."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Size, Tensor, nn

from finespun.adapters.packed import PackedTensors, Slot
from finespun.contract import Bank, Plan, SiteShape
from finespun.contract.mixing import mount
from finespun.contract.structure import TIE
from finespun.errors import BaseMismatch, FileError, TargetError, nearest
from finespun.files.native import DAMAGED, Saved, check_scale, plan_as_json
from finespun.files.provenance.fingerprint import check_base
from finespun.hosts import Entry, modules, register, sites, tensors_of
from finespun.hosts.attach import check_trained
from finespun.hosts.layers.tied import ties
from finespun.hosts.targets import OWN
from finespun.storage.memory_limit import bounded

SHOWN = 12
REMEMBERED = 16


class Form(NamedTuple):
    """What one tensor must look like."""

    shape: Size
    floating: bool


class Forms(NamedTuple):
    """All tensors that an adapter must have, each site's rank where it has factors, and the plan
    and table that adapters alike share instead of holding their own."""

    tensors: dict[str, Form]
    ranks: dict[str, int]
    plan: Plan
    table: Mapping[str, Slot]


_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Forms]] = WeakKeyDictionary()


def register_saved(model: nn.Module, saved: Saved, force: bool = False) -> list[str]:
    """Make an adapter that was read from files known to the model, flat: only its bytes are held
    until it is activated. Returns notes for a person to hear.

    Raises FileError naming every missing, unknown or ill-shaped tensor, TargetError or PlanError
    where the model lacks a site, BaseMismatch for another base unless `force`. The model is then
    untouched.
    """
    settle(model, saved.entry)
    check_fit(model, saved.entry)
    notes = [*saved.notes, *_check_repeated(model, saved.repeated, force)]
    if saved.base is not None:
        notes += check_base(saved.base, model, force)
    else:
        notes.append(
            f"{saved.entry.name!r} carries no fingerprint of its base: only names and shapes were "
            "checked"
        )
    _share(_forms(model, saved.entry), saved.entry)
    register(model, saved.entry)
    return notes


def settle(model: nn.Module, entry: Entry) -> None:
    """Give the sites whose size their file does not tell the model's: trained rows of a table, at
    all uses of it, and biases without a LoRA beside them. Where such a bias belongs to no layer
    that can be adapted (a norm's), the entry holds a copy of its module. Raises TargetError."""
    plan, tensors = entry.plan, tensors_of(entry)
    waiting = {n for n, c in plan.choices.items() if c.get("open")}
    if not waiting:
        return
    known, settled = modules(model), dict[str, SiteShape]()
    choices = {n: {k: v for k, v in c.items() if k != "open"} for n, c in plan.choices.items()}
    for site in plan.sites:
        if site.name not in waiting:
            continue
        if "tokens" not in choices[site.name] and _is_norm(known.get(site.name)):
            own = tensors.pop(f"delta/{site.name}/b")
            whole = {**_own_state(known[site.name]), "bias": own}
            tensors |= {f"trained/{site.name}/{k}": v for k, v in whole.items()}
            entry.trained = (*entry.trained, site.name)
            del choices[site.name]
        else:
            settled[site.name] = sites(model, [site.name], entry.structure)[site.name].shape
    shapes = tuple(settled.get(s.name, s) for s in plan.sites if s.name in choices)
    tables = [n for n in settled if "tokens" in choices[n]]
    shared = {**plan.shared, TIE: ties(model, tables)} if tables else plan.shared
    entry.plan = Plan(shapes, choices, {k: v for k, v in shared.items() if k != TIE or v})
    entry.flat = PackedTensors.pack(tensors)


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors without those that adapters put into it."""
    state = module.state_dict()
    return {k: v for k, v in state.items() if not any(part in OWN for part in k.split("."))}


def _is_norm(module: nn.Module | None) -> bool:
    """Whether a module holds vectors alone, a bias among them."""
    if module is None or module._parameters.get("bias") is None or {*module._modules} - {*OWN}:
        return False
    return all(p is None or p.dim() < 2 for p in module._parameters.values())


def _check_repeated(model: nn.Module, repeated: Mapping[str, Tensor], force: bool) -> Iterable[str]:
    """Numbers of the base that a file repeats must be the model's."""
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


def _share(forms: Forms, entry: Entry) -> None:
    """Hold the plan, and the table where it is the same, once for all adapters of this form."""
    entry.plan = forms.plan
    if entry.flat is not None and list(entry.flat.table.items()) == list(forms.table.items()):
        entry.flat = PackedTensors(entry.flat.data, forms.table)


def check_fit(model: nn.Module, entry: Entry) -> None:
    """Raise unless the entry's plan fits the model and its tensors fit the plan."""
    forms = _forms(model, entry)
    tensors = tensors_of(entry)
    problems = list(_problems(forms, tensors))
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise FileError(
            f"adapter {entry.name!r} does not fit: " + "; ".join(problems[:SHOWN]) + more
        )


def _forms(model: nn.Module, entry: Entry) -> Forms:
    """The forms are worked out once for each model and plan."""
    plan = json.dumps([entry.structure.kind, entry.structure.options(), plan_as_json(entry.plan)])
    key = hashlib.sha256(f"{plan}{entry.trained}".encode()).hexdigest()
    known = _KNOWN.setdefault(model, {})
    if key not in known:
        while len(known) >= REMEMBERED:
            del known[next(iter(known))]
        known[key] = _work_out(model, entry)
    return known[key]


def _work_out(model: nn.Module, entry: Entry) -> Forms:
    structure, plan, present = entry.structure, entry.plan, modules(model)
    hosts = sites(model, (s.name for s in plan.sites), structure)
    plan.fit(h.shape for h in hosts.values())
    check_trained(model, list(hosts), entry.trained)
    parts: dict[str, Mapping[str, Tensor]] = {}
    ranks: dict[str, int] = {}
    try:
        with bounded(f"adapter {entry.name!r}"), torch.no_grad():
            bank: Bank | None = structure.bank(plan)
            if bank is not None:
                parts["bank"] = bank.state_dict()
            asked = _bytes(parts.get("bank", {}))
            for name, host in hosts.items():
                delta = mount(structure.build(host, plan, bank), plan.choices[name])
                check_scale(name, delta.scale)
                delta.switch_on()
                parts[f"delta/{name}"] = delta.state_dict()
                asked += _bytes(parts[f"delta/{name}"])
                _check_promised(entry, asked)
                pair = delta.low_rank()
                if pair is not None:
                    ranks[name] = pair[0].shape[0]
    except (*DAMAGED, MemoryError) as error:
        raise FileError(f"adapter {entry.name!r}: its plan cannot be built: {error!r}") from error
    for name in entry.trained:
        parts[f"trained/{name}"] = _own_state(present[name])
    tensors = {
        f"{part}/{key}": Form(v.shape, v.is_floating_point())
        for part, state in parts.items()
        for key, v in state.items()
    }
    return Forms(tensors, ranks, plan, {} if entry.flat is None else entry.flat.table)


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def _check_promised(entry: Entry, asked: int) -> None:
    """Raise FileError once the plan asks for far more bytes than the file holds, whose numbers may
    be up to eight times narrower: before more is built."""
    if entry.flat is not None and asked > 8 * entry.flat.data.numel() + (1 << 20):
        raise FileError(
            f"adapter {entry.name!r}: its plan asks for {asked:,} bytes and more, the file of "
            f"tensors holds {entry.flat.data.numel():,}"
        )


def _problems(forms: Forms, tensors: Mapping[str, Tensor]) -> Iterable[str]:
    expected = dict(forms.tensors)
    for key in tensors.keys() - expected.keys():
        form = _optional(key, forms)
        if form is None:
            yield f"{key!r} belongs to nothing; {nearest(key, forms.tensors)}"
        else:
            expected[key] = form
            expected |= _with_start(key, forms)
    for key, form in sorted(expected.items()):
        if key not in tensors:
            yield f"{key!r} is missing"
        elif tensors[key].shape != form.shape:
            yield f"{key!r} is {tuple(tensors[key].shape)}, expected {tuple(form.shape)}"
        elif tensors[key].is_floating_point() != form.floating:
            yield f"{key!r} is {tensors[key].dtype}"


def _optional(key: str, forms: Forms) -> Form | None:
    """The form of a tensor that an adapter may have: an exact start, a gate, a mask."""
    place, _, name = key.rpartition("/")
    own = f"{place}/{name.removeprefix('start.')}"
    if own in forms.tensors:
        return forms.tensors[own]
    name = name.removeprefix("start.")
    if name == "alive" and place in {f"delta/{site.name}" for site in forms.plan.sites}:
        return Form(Size([]), False)
    if name == "gate" and place.removeprefix("delta/") in forms.ranks:
        return Form(Size([forms.ranks[place.removeprefix("delta/")]]), True)
    masked = f"{place}/{name.removeprefix('alive_')}"
    if name.startswith("alive_") and masked in forms.tensors:
        return Form(forms.tensors[masked].shape, False)
    return None


def _with_start(key: str, forms: Forms) -> dict[str, Form]:
    """Where one number of an exact start is given, all must be."""
    place, _, name = key.rpartition("/")
    if not name.startswith("start."):
        return {}
    return {
        f"{place}/start.{k.removeprefix(place + '/')}": form
        for k, form in forms.tensors.items()
        if k.startswith(place + "/")
    }
