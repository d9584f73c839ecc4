"""Who made an adapter: method, options, recipe, seeds, metrics, parents, versions, date."""

import datetime
import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from typing import Any, TypeVar

from finespun.contract import Structure
from finespun.errors import FileError, nearest

T = TypeVar("T")
REMEMBERED = 64
_HELD: dict[str, Any] = {}
_PACKAGES = ("finespun", "torch", "safetensors", "numpy", "transformers", "peft")


@dataclass(frozen=True)
class Parent:
    """An adapter that another was made from; `sha256` is that of its file of tensors."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Where an adapter comes from, stored with it.

    `recipe` is the whole text of the recipe that made it, `task` the kind and options of what it
    learned, the classes of its labels among them,
    `metrics` are names and values as measured then, `created` is UTC in ISO 8601. What is made of
    it keeps recipe and task.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    task: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[Parent, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    def shared(self) -> "Lineage":
        """The same with the parts in common with others held once."""
        return replace(
            self,
            options=_once(self.options),
            versions=_once(self.versions),
            recipe=_once(self.recipe),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite becomes its name as text."""
        found: dict[str, Any] = _jsonable(asdict(self))
        return found

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> "Lineage":
        """Raises FileError, beginning with `where`, for unknown keys and values of another kind."""
        known = {*(f.name for f in fields(cls)), "classes"}
        for key in content:
            if key not in known:
                raise FileError(f"{where}: lineage has no {key!r}; {nearest(key, known)}")
        values = dict(content)
        if (classes := values.pop("classes", None)) is not None:  # 0.1 kept these of a task
            values.setdefault("task", {"classes": classes})
        try:
            values["parents"] = tuple(Parent(**p) for p in values.get("parents", ()))
            found = cls(**values)
        except TypeError as error:
            raise FileError(f"{where}: lineage: {error}") from error
        for name in ("options", "task", "seeds", "metrics", "versions"):
            if not isinstance(getattr(found, name), Mapping):
                raise FileError(f"{where}: lineage.{name} must be an object")
        texts = [("method", found.method), ("created", found.created)]
        texts += [("recipe", found.recipe)] if found.recipe is not None else []
        for parent in found.parents:
            texts += [("parents.name", parent.name), ("parents.sha256", parent.sha256)]
        classes = found.task.get("classes") or []
        if not isinstance(classes, list | tuple):
            raise FileError(f"{where}: lineage.classes must be a list")
        texts += [("classes", name) for name in classes]
        for name, value in texts:
            if not isinstance(value, str):
                raise FileError(f"{where}: lineage.{name} must be text, got {str(value)[:80]!r}")
        return found


def lineage_of(
    structure: Structure,
    recipe: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    seeds: Mapping[str, int] | None = None,
    parents: tuple[Parent, ...] = (),
    task: Mapping[str, Any] | None = None,
) -> Lineage:
    """The lineage of an adapter that is made now, with these packages."""
    return Lineage(
        method=structure.kind,
        options=structure.options(),
        recipe=recipe,
        task=task or {},
        seeds={"structure": structure.seed, **(seeds or {})},
        metrics=metrics or {},
        parents=parents,
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages in use that decide what an adapter does."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        if name in sys.modules:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "not installed as a package"
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return value


def _once(value: T) -> T:
    """The equal value that was seen before, of the last few, or this one."""
    key = repr(value)
    if key not in _HELD and len(_HELD) >= REMEMBERED:
        _HELD.pop(next(iter(_HELD)), None)
    found: T = _HELD.setdefault(key, value)
    return found
