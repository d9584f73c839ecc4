"""Finespun's own format: `adapter.safetensors` and `adapter.json`, number 1.

The JSON says structure and options, the plan, trained modules, strength, base and lineage; the
tensors have the keys of `adapters.keys`. Every key is checked; an unknown one is an error.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from finespun.adapters.fingerprint import Fingerprint
from finespun.adapters.keys import parsed, spelt
from finespun.adapters.lineage import Lineage, lineage_of
from finespun.adapters.state import AdapterState, plan_as_json
from finespun.contract import Plan, SiteShape, Structure
from finespun.errors import FileError, StateError, StrictError, nearest
from finespun.files.provenance.model_card import model_card, write_card
from finespun.files.saved import Saved
from finespun.hosts import Attached, adapter_set_of, fingerprint
from finespun.methods.axes import STRUCTURE
from finespun.storage.atomic import settled, whole_folder
from finespun.storage.blame import a_list, a_text, an_object, blame, finite_number
from finespun.storage.safe_io import (
    check_finite,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

Beside = Callable[[Path], None]
FORMAT = 1
TENSORS, CONFIG = "adapter.safetensors", "adapter.json"
KEYS = ("format", "name", "structure", "plan", "trained", "strength", "dtypes", "base", "lineage")


def save(
    model: nn.Module,
    name: str,
    folder: str | Path,
    lineage: Lineage | None = None,
    beside: Beside | None = None,
) -> dict[str, Any]:
    """Write adapter `name` of the model to a folder, whole or not at all; returns adapter.json.
    `lineage` takes the place of the adapter's own; `beside` is handed the folder of the new files
    and may write more, which appear in the same moment.

    Raises StateError for values that are NaN, infinite or sharded away, FileError where the folder
    cannot be written.
    """
    state = state_of(model, name)
    return write(state if lineage is None else replace(state, lineage=lineage), folder, beside)


def state_of(model: nn.Module, name: str, copy: bool = False) -> AdapterState:
    """An adapter of the model as a state with the fingerprint of its base; its tensors are those of
    live modules unless `copy`. Raises StateError for values that are NaN, infinite or sharded
    away."""
    held = adapter_set_of(model)[name]
    if isinstance(held, Attached):
        held = held.snapshot() if copy else held.lent()
    checked(held)
    return replace(held, base=fingerprint(model, held.trained))


def write(state: AdapterState, folder: str | Path, beside: Beside | None = None) -> dict[str, Any]:
    """Write a state to a folder, whole or not at all; returns adapter.json. A state without a
    lineage gets one that is made now; `beside` as in `save`. Raises as `save` does."""
    checked(state)
    lineage = state.lineage or lineage_of(state.structure)
    tensors = spelt(state.tensors)
    content: dict[str, Any] = {
        "format": FORMAT,
        "name": state.name,
        "structure": {"kind": state.structure.kind, "options": state.structure.options()},
        "plan": plan_as_json(state.plan),
        "trained": list(state.trained),
        "strength": state.strength,
        "dtypes": Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values()),
        "base": None if state.base is None else state.base.as_json(),
        "lineage": lineage.as_json(),
    }
    with whole_folder(folder, sum(t.nbytes for t in tensors.values()) + (1 << 20)) as work:
        content["sha256"] = write_tensors(work / TENSORS, tensors, {"format": "finespun"})
        write_json(work / CONFIG, content)
        write_card(work, folder, model_card(state.name, tensors, state.base, lineage))
        if beside is not None:
            beside(work)
    return content


def read(folder: str | Path, strict: bool = True) -> Saved:
    """The adapter in a folder that `save` wrote. With `strict` off, unknown keys and a file of
    tensors that was changed since become notes. Raises FileError naming file and key."""
    place = settled(folder)
    path = place / CONFIG
    content = read_json(path)
    notes: list[str] = []
    number = content.get("format")
    if number != FORMAT:
        raise FileError(f"{path} has format {number!r}; this version reads {FORMAT}")
    _only(content, (*KEYS, "sha256"), str(path), strict, notes)
    held = read_tensors(place / TENSORS)
    if held.sha256 != content["sha256"]:
        told = f"{TENSORS} is not the file that {CONFIG} was written with"
        if strict:
            raise StrictError(f"{place}: {told}")
        notes.append(told)
    with blame(path):
        trained = tuple(a_text(t, "trained") for t in a_list(content["trained"], "trained"))
        state = AdapterState.pack(
            name=a_text(content["name"], "name"),
            structure=_structure(content["structure"], strict, notes),
            plan=plan_from_json(content["plan"], strict, notes),
            tensors=parsed(held.tensors, trained),
            trained=trained,
            strength=finite_number(content["strength"], "strength"),
        )
        if not state.plan.sites and not state.trained:
            raise FileError("neither a site nor a trained module is named")
    base = None
    if content["base"] is not None:
        base = Fingerprint.from_json(an_object(content["base"], f"{path}: base"), str(path))
    lineage = Lineage.from_json(an_object(content["lineage"], f"{path}: lineage"), str(path))
    return Saved(replace(state, base=base, lineage=lineage), held.sha256, tuple(notes))


def checked(state: AdapterState) -> AdapterState:
    """The state. Raises StateError where a tensor holds NaN, infinity or nothing."""
    for key, tensor in state.tensors.items():
        if not tensor.numel():
            raise StateError(
                f"{key!r} holds no parameters here; gather sharded parameters before saving"
            )
        try:
            check_finite(tensor, repr(key))
        except FileError as error:
            raise StateError(f"{state.name!r} is not saved: {error}") from error
    return state


def plan_from_json(content: Any, strict: bool = True, notes: list[str] | None = None) -> Plan:
    """Raises FileError for anything that `plan_as_json` does not write."""
    content = an_object(content, "plan")
    _only(content, ("sites", "choices", "shared"), "plan", strict, [] if notes is None else notes)
    sites = tuple(_site(s) for s in a_list(content["sites"], "plan.sites"))
    names = {s.name for s in sites}
    if len(names) != len(sites):
        raise FileError("plan.sites must name no site twice")
    choices = an_object(content["choices"], "plan.choices")
    for name in choices:
        if name not in names:
            raise FileError(f"plan.choices names {name!r}, no site; {nearest(name, names)}")
        an_object(choices[name], f"plan.choices.{name}")
    return Plan(sites, choices, an_object(content["shared"], "plan.shared"))


def _site(content: Any) -> SiteShape:
    name, out, size, kind = a_list(content, "plan.sites", 4)
    for number in (out, size):
        if type(number) is not int or not 0 < number < 2**31:
            raise FileError(f"plan.sites: {name!r} has a size of {number!r}")
    return SiteShape(a_text(name, "plan.sites"), out, size, a_text(kind, "plan.sites"))


def _structure(content: Any, strict: bool, notes: list[str]) -> Structure:
    content = an_object(content, "structure")
    _only(content, ("kind", "options"), "structure", strict, notes)
    kind = a_text(content["kind"], "structure.kind")
    options = an_object(content["options"], "structure.options")
    if kind in STRUCTURE.known:
        known = {f.name for f in dataclasses.fields(STRUCTURE.find(kind))}
        extra = sorted(options.keys() - known)
        if extra and strict:
            told = f"{kind} has no option {extra[0]!r}; {nearest(extra[0], known)}"
            raise StrictError(f"structure.options: {told}")
        notes += [f"{CONFIG}: option {e!r} of {kind!r} is unknown and left out" for e in extra]
        options = {k: v for k, v in options.items() if k in known}
    return STRUCTURE.make(kind, **options)


def _only(
    content: Mapping[str, Any], known: tuple[str, ...], where: str, strict: bool, notes: list[str]
) -> None:
    """Every known key is there and, if strict, no other."""
    for key in known:
        if key not in content:
            raise FileError(f"{where}: {key!r} is missing; {nearest(key, content)}")
    for key in content.keys() - set(known):
        told = f"{where}: {key!r} is unknown; {nearest(key, known)}"
        if strict:
            raise StrictError(told)
        notes.append(told)
