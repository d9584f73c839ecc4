"""Reading checkpoints of PEFT's other methods: their own options and tensors, under our names.

Sizes that such a file does not give are the model's, so its layers are needed: those of the model,
or a mapping that gives them by name. Methods whose frozen
parameters PEFT draws in its own way are read as the LoRA that they are: VeRA as B' = diag(b)·B,
A' = diag(d)·A, RandLoRA as its bases side by side, Uni-LoRA as its entries of θ in their places.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finespun.adapters.keys import Key, of_bank, of_module, of_site
from finespun.adapters.state import AdapterState
from finespun.contract import Bank, Plan, Ranked, Site, Structure
from finespun.errors import FileError, StrictError, nearest
from finespun.files.lora import PASSED
from finespun.files.peft.keys import PREFIX, in_order, repeated, saved_module
from finespun.files.peft.read import CONFIG, TENSORS
from finespun.files.peft.table import (
    BANK_TENSORS,
    METHODS,
    PEFT_TYPES,
    START_OPTIONS,
    Config,
    Found,
    Reading,
)
from finespun.files.saved import Saved, named_after
from finespun.hosts import sites
from finespun.methods.axes import STRUCTURE
from finespun.methods.structures.lora import LoRA
from finespun.storage.atomic import settled
from finespun.storage.blame import blame
from finespun.storage.memory_limit import bounded
from finespun.storage.safe_io import read_json, read_tensors

# the sites of these names for a structure, some of which the file says are tables
Layers = Callable[[Iterable[str], Structure, Collection[str]], Mapping[str, Site]]
SHARED = "base_model."
OFF: tuple[Any, ...] = (None, False, 0, 0.0, "none", "", {}, [])
BIAS = "trained biases lie in the base's own layers"


def read_method(
    folder: str | Path, layers: nn.Module | Layers | None, strict: bool = True
) -> Saved | None:
    """The adapter in a folder of PEFT's, for a model or its `layers`; None where its method is none
    of these.

    Raises FileError naming the method, option or tensor that is not read, or where `layers` is None
    and needed, TargetError for a layer that the model lacks.
    """
    place = settled(folder)
    config = read_json(place / CONFIG) if (place / CONFIG).is_file() else {}
    kind = str(config.get("peft_type", "LORA"))
    if kind not in PEFT_TYPES:
        raise FileError(
            f"{place / CONFIG}: peft_type is {kind[:60]!r}, which is not read; read are "
            + ", ".join(PEFT_TYPES)
        )
    if kind not in METHODS:
        return None
    if layers is None:
        raise FileError(
            f"{place}: {kind} is read with its model only, whose layers give the sizes: name the "
            "base (model=..., on the command line --model), or load it by fs.load(model, folder)"
        )
    held, method = read_tensors(place / TENSORS), METHODS[kind]
    with blame(place), bounded(str(place)):
        notes = check_options(method, config, strict)
        saved = config.get("modules_to_save") or []
        found, shared, whole, base = sort(held.tensors, [str(n) for n in saved])
        if method.drawn is not None and not found:
            found = method.drawn(layers, config, shared)
            notes.append(f"its places in {len(found)} layers are drawn again from proj_seed")
        if not found:
            raise FileError(f"{TENSORS} holds no layer's tensors")
    made = STRUCTURE.find(method.kind)()
    if isinstance(layers, nn.Module):
        hosts: Mapping[str, Site] = sites(layers, found, made)
    else:
        hosts = layers(found, made, [p for p, own in found.items() if any(map(_of_table, own))])
    with blame(place), bounded(str(place)):
        if method.factors is None:
            found = {path: _renamed(method, path, state) for path, state in found.items()}
            made = _structure(method, config, found)
            plan, tensors = _own(method, made, hosts, found, shared, config)
        else:
            made, plan, tensors = _as_lora(method, hosts, found, shared, config)
            notes.append(f"{kind} is read as the LoRA of rank {made.rank} that it is")
    for module, own in whole.items():
        tensors |= of_module(module, own)
    state = AdapterState.pack(named_after(folder), made, plan, tensors, trained=tuple(whole))
    return Saved(state, held.sha256, tuple(notes), base)


def _of_table(name: str) -> bool:
    return "_embedding_" in name


def split(name: str) -> tuple[str, str]:
    """A tensor's name below PEFT's prefix as the path of its layer and its own name there."""
    parts = name.split(".")
    place = len(parts) - (2 if parts[-1] == "weight" else 1)
    return ".".join(parts[:place]), ".".join(parts[place:])


def sort(
    tensors: Found, saved: list[str]
) -> tuple[
    dict[str, dict[str, Tensor]],
    dict[str, Tensor],
    dict[str, dict[str, Tensor]],
    dict[str, Tensor],
]:
    """Tensors by site, those that all sites share, modules saved whole, and parameters of the base
    that the file repeats."""
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        module = saved_module(name, saved)
        if name == key:
            if not key.startswith(SHARED):
                raise FileError(f"{key!r} does not begin with {PREFIX!r}")
            shared[key.removeprefix(SHARED)] = tensor
        elif module is not None:
            whole.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor
        elif (number := repeated(name)) is not None:
            base[number] = tensor
        else:
            path, own = split(name)
            if not path:
                raise FileError(f"{key!r} is no layer's and not under modules_to_save")
            found.setdefault(path, {})[own] = tensor
    return in_order(found), shared, whole, base


def check_options(method: Reading, config: Config, strict: bool) -> list[str]:
    """Raise FileError for options that change what the adapter does and are not read, and if strict
    for unknown ones; returns notes on what else the user should know."""
    own = {f.name for f in dataclasses.fields(STRUCTURE.find(method.kind))}
    own |= set(STRUCTURE.find(method.kind).aliases)
    passed = {
        *own,
        *PASSED,
        *START_OPTIONS,
        *method.unused,
        "peft_type",
        "modules_to_save",
        "dropout",
        "bias",
    }
    notes = []
    for key, value in config.items():
        told = f"{key}={str(value)[:60]}"
        allowed, why = method.fixed.get(key, ((value,), ""))
        if key == "bias" and value not in OFF:
            allowed, why = (), BIAS
        if value not in allowed:
            raise FileError(
                f"{told} is not read: {why}; merge it in PEFT (merge_and_unload) and save the model"
            )
        if (text := method.notes.get(told)) is not None:
            notes.append(f"{told}: {text}")
        if value not in OFF and key not in passed and "dropout" not in key:
            notes.append(f"{told} is unknown; {nearest(key, passed)}")
            if strict:
                raise StrictError(notes[-1])
    return notes


def _structure(method: Reading, config: Config, found: Mapping[str, Found]) -> Structure:
    known = STRUCTURE.find(method.kind)
    with _complete(method, "a layer"):
        options = {**config, **method.options(config, found)}
    own = {f.name for f in dataclasses.fields(known)} | set(known.aliases)
    taken = {k: v for k, v in options.items() if k in own - {"seed"} and k not in method.unused}
    whole = {f.name for f in dataclasses.fields(known) if f.type is int}
    for name, value in taken.items():
        if known.aliases.get(name, name) in whole and type(value) is not int:
            raise FileError(f"{name}={str(value)[:60]} must be a whole number")
    return STRUCTURE.make(method.kind, **taken)


def _own(
    method: Reading,
    made: Structure,
    hosts: Mapping[str, Site],
    found: Mapping[str, Found],
    shared: Found,
    config: Config,
) -> tuple[Plan, dict[Key, Tensor]]:
    tensors, choices = dict[Key, Tensor](), {}
    for path, held in found.items():
        shape = hosts[path].shape
        with _complete(method, repr(path)):
            own = method.change(held, shape, config)
            mine = dataclasses.replace(made, **method.site(own, shape, config))
            more = method.choice(own, shape, config)
            choices[path] = {**_choice(mine, hosts[path], bool(more)), **more}
        tensors |= of_site(path, own)
    plan = Plan(tuple(h.shape for h in hosts.values()), choices)
    return plan, tensors | _bank(made.bank(plan), shared)


def _bank(bank: Bank | None, shared: Found) -> dict[Key, Tensor]:
    """The tensors that all sites share, if they are those of our bank."""
    known = {} if bank is None else bank.state_dict()
    for name, tensor in shared.items():
        if name not in BANK_TENSORS or BANK_TENSORS[name] not in known:
            raise FileError(f"'{SHARED}{name}' is unknown; {nearest(name, BANK_TENSORS)}")
        if tensor.shape != (size := known[BANK_TENSORS[name]].shape):
            raise FileError(f"'{SHARED}{name}' is {tuple(tensor.shape)}, expected {tuple(size)}")
    return of_bank({BANK_TENSORS[name]: tensor for name, tensor in shared.items()})


def _choice(made: Structure, host: Site, told: bool) -> dict[str, Any]:
    """What the plan says of a site besides what the file gave. PEFT's ranks have no limit, ours
    have one for new updates."""
    if isinstance(made, Ranked) and (told or type(made).choose is Ranked.choose):
        return {"rank": made.rank, "scale": made.scale}
    return dict(made.plan([host]).choices[host.shape.name])


@contextmanager
def _complete(method: Reading, where: str) -> Iterator[None]:
    """Say in PEFT's words what a layer lacks."""
    try:
        yield
    except KeyError as error:
        theirs = next((k for k, v in method.names.items() if v == error.args[0]), None)
        if theirs is None:
            raise FileError(f"the config lacks {error.args[0]!r}") from error
        raise FileError(f"{where} lacks {theirs!r}") from error


def _renamed(method: Reading, path: str, state: Found) -> dict[str, Tensor]:
    own = {}
    for name, tensor in state.items():
        if name not in method.names:
            raise FileError(f"'{PREFIX}{path}.{name}' is unknown; {nearest(name, method.names)}")
        if (ours := method.names[name]) is not None:
            own[ours] = tensor
    return own


def _as_lora(
    method: Reading,
    hosts: Mapping[str, Site],
    found: Mapping[str, Found],
    shared: Found,
    config: Config,
) -> tuple[LoRA, Plan, dict[Key, Tensor]]:
    tensors, choices = dict[Key, Tensor](), {}
    if not shared or method.factors is None:
        raise FileError(method.needs)
    for path, state in found.items():
        A, B = method.factors(state, shared, hosts[path].shape, config)
        tensors |= of_site(path, {"A": A.contiguous(), "B": B.contiguous()})
        choices[path] = {"rank": len(A), "scale": 1.0}
    most = max(int(c["rank"]) for c in choices.values())
    dropout = next((float(v) for k, v in config.items() if k.endswith("_dropout")), 0.0)
    made = LoRA(rank=most, alpha=float(most), dropout=dropout)
    return made, Plan(tuple(h.shape for h in hosts.values()), choices), tensors
