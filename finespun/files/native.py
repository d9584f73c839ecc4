"""Finespun's own format: `adapter.safetensors` and `adapter.json`, number 1.

The JSON says structure and options, the plan, trained modules, strength, base and lineage; the
tensors have the keys of `hosts.tensors_of`. Every key is checked; an unknown one is an error.
"""

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finespun.adapters.packed import PackedTensors
from finespun.contract import Plan, SiteShape, Structure
from finespun.errors import FileError, InputError, StateError, StrictError, nearest
from finespun.files.provenance.fingerprint import Fingerprint, fingerprint
from finespun.files.provenance.lineage import Lineage, lineage_of
from finespun.files.provenance.model_card import model_card, write_card
from finespun.hosts import Entry, adapter_set_of, tensors_of
from finespun.methods.axes import STRUCTURE
from finespun.storage.atomic import located, settled, whole_folder
from finespun.storage.safe_io import (
    check_finite,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

FORMAT = 1
TENSORS, CONFIG = "adapter.safetensors", "adapter.json"
# what code meets where a file holds a value of another kind or size than it should
DAMAGED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)
LARGEST = 3.4e38
KEYS = ("format", "name", "structure", "plan", "trained", "strength", "dtypes", "base", "lineage")


@dataclass(frozen=True)
class Saved:
    """An adapter read from files: a flat entry that no model knows yet, and what is told of it.

    `notes` are things that a person should hear; `sha256` is that of the file of tensors;
    `repeated` are numbers of the base, by name, that lie in the file as well.
    """

    entry: Entry
    base: Fingerprint | None
    lineage: Lineage | None
    sha256: str
    notes: tuple[str, ...] = ()
    repeated: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def named(self, name: str | None) -> "Saved":
        """The same adapter under another name; under its own where `name` is None."""
        if name is None:
            return self
        return dataclasses.replace(self, entry=dataclasses.replace(self.entry, name=name))


def named_after(place: str | Path) -> str:
    """The name of an adapter whose file tells none: that of its folder or file."""
    return re.sub(r"[.:/]", "-", located(place).name) or "default"


def save(
    model: nn.Module, name: str, folder: str | Path, lineage: Lineage | None = None
) -> dict[str, Any]:
    """Write adapter `name` of the model to a folder, whole or not at all; returns adapter.json.

    Raises StateError for numbers that are NaN, infinite or sharded away, FileError where the folder
    cannot be written.
    """
    entry = adapter_set_of(model)[name]
    checked_tensors(entry)
    base = fingerprint(model, entry.trained)
    return write(entry, base, lineage or lineage_of(entry.structure), folder)


def write(
    entry: Entry, base: Fingerprint | None, lineage: Lineage, folder: str | Path
) -> dict[str, Any]:
    """`save` for an adapter that is on no model; `base` is None where nobody knows it."""
    tensors = checked_tensors(entry)
    content: dict[str, Any] = {
        "format": FORMAT,
        "name": entry.name,
        "structure": {"kind": entry.structure.kind, "options": entry.structure.options()},
        "plan": plan_as_json(entry.plan),
        "trained": list(entry.trained),
        "strength": entry.scale,
        "dtypes": Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values()),
        "base": None if base is None else base.as_json(),
        "lineage": lineage.as_json(),
    }
    with whole_folder(folder, sum(t.nbytes for t in tensors.values()) + (1 << 20)) as work:
        content["sha256"] = write_tensors(work / TENSORS, tensors, {"format": "finespun"})
        write_json(work / CONFIG, content)
        write_card(work, folder, model_card(entry.name, tensors, base, lineage))
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
        entry = Entry(
            name=_text(content["name"], "name"),
            structure=_structure(content["structure"], strict, notes),
            plan=plan_from_json(content["plan"], strict, notes),
            trained=tuple(_text(t, "trained") for t in _list(content["trained"], "trained")),
            scale=finite_number(content["strength"], "strength"),
            flat=PackedTensors.pack(held.tensors),
        )
        if not entry.plan.sites and not entry.trained:
            raise FileError("neither a site nor a trained module is named")
    base = None
    if content["base"] is not None:
        base = Fingerprint.from_json(_object(content["base"], f"{path}: base"), str(path))
    lineage = Lineage.from_json(_object(content["lineage"], f"{path}: lineage"), str(path))
    return Saved(entry, base, lineage, held.sha256, tuple(notes))


def checked_tensors(entry: Entry) -> dict[str, Tensor]:
    """The entry's tensors. Raises StateError for one that holds NaN, infinity or nothing."""
    tensors = tensors_of(entry)
    for key, tensor in tensors.items():
        if not tensor.numel():
            raise StateError(
                f"{key!r} holds no numbers here; gather sharded parameters before saving"
            )
        try:
            check_finite(tensor, repr(key))
        except FileError as error:
            raise StateError(f"{entry.name!r} is not saved: {error}") from error
    return tensors


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Sites as [name, out, in, kind], choices site by site, and what is shared."""
    return {
        "sites": [[s.name, s.out_features, s.in_features, s.kind] for s in plan.sites],
        "choices": {name: dict(choice) for name, choice in plan.choices.items()},
        "shared": dict(plan.shared),
    }


def plan_from_json(content: Any, strict: bool = True, notes: list[str] | None = None) -> Plan:
    """Raises FileError for anything that `plan_as_json` does not write."""
    content = _object(content, "plan")
    _only(content, ("sites", "choices", "shared"), "plan", strict, [] if notes is None else notes)
    sites = tuple(_site(s) for s in _list(content["sites"], "plan.sites"))
    names = {s.name for s in sites}
    if len(names) != len(sites):
        raise FileError("plan.sites must name no site twice")
    choices = _object(content["choices"], "plan.choices")
    for name in choices:
        if name not in names:
            raise FileError(f"plan.choices speaks of {name!r}, no site; {nearest(name, names)}")
        _object(choices[name], f"plan.choices.{name}")
    return Plan(sites, choices, _object(content["shared"], "plan.shared"))


def _site(content: Any) -> SiteShape:
    name, out, size, kind = _list(content, "plan.sites", 4)
    for number in (out, size):
        if type(number) is not int or not 0 < number < 2**31:
            raise FileError(f"plan.sites: {name!r} has a size of {number!r}")
    return SiteShape(_text(name, "plan.sites"), out, size, _text(kind, "plan.sites"))


def _structure(content: Any, strict: bool, notes: list[str]) -> Structure:
    content = _object(content, "structure")
    _only(content, ("kind", "options"), "structure", strict, notes)
    kind = _text(content["kind"], "structure.kind")
    options = _object(content["options"], "structure.options")
    if kind in STRUCTURE.known:
        known = {f.name for f in dataclasses.fields(STRUCTURE.find(kind))}
        extra = sorted(options.keys() - known)
        if extra and strict:
            told = f"{kind} has no option {extra[0]!r}; {nearest(extra[0], known)}"
            raise StrictError(f"structure.options: {told}")
        notes += [f"{CONFIG}: option {e!r} of {kind!r} is unknown and left out" for e in extra]
        options = {k: v for k, v in options.items() if k in known}
    return STRUCTURE.make(kind, **options)


def check_scale(name: str, scale: Any) -> None:
    """Raise FileError unless the scale that a plan gave a site's update is one that float32 has."""
    if abs(finite_number(scale, f"the scale of {name!r}")) > LARGEST:
        raise FileError(f"the scale of {name!r} is {scale}, larger than any number in float32")


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


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Name the file in errors about its content."""
    try:
        yield
    except StrictError as error:
        raise StrictError(f"{path}: {error}") from error
    except (FileError, InputError) as error:
        raise FileError(f"{path}: {error}") from error
    except DAMAGED as error:
        raise FileError(f"{path} is damaged: {error!r}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    return _typed(value, where, "an object", lambda v: isinstance(v, dict))


def _list(value: Any, where: str, length: int | None = None) -> list[Any]:
    def fits(v: Any) -> bool:
        return isinstance(v, list) and length in (None, len(v))

    return _typed(value, where, "a list" if length is None else f"a list of {length}", fits)


def _text(value: Any, where: str) -> str:
    return _typed(value, where, "text", lambda v: isinstance(v, str) and 0 < len(v) <= 1024)


def finite_number(value: Any, where: str) -> float:
    """Raise FileError unless the value is a finite number."""

    def fits(v: Any) -> bool:
        return type(v) in (int, float) and abs(v) <= sys.float_info.max

    return float(_typed(value, where, "a finite number", fits))


def _typed(value: Any, where: str, what: str, fits: Callable[[Any], bool]) -> Any:
    if not fits(value):
        raise FileError(f"{where} must be {what}, got {str(value)[:80]!r}")
    return value
