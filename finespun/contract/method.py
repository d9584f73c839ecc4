"""A method of one axis: hyper-parameters under a name, as recipes and files state them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin

from finespun.contract.need import Need
from finespun.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a user chooses of one published method. `kind` names it on its `axis`, `aliases` are
    other names of its options (PEFT's), `title` is its name in prose, `source` the paper."""

    axis: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    aliases: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *values: Any, **options: Any) -> Self:
        """Raise InputError for options that are not given by name, unknown or of another type."""
        fields = dataclasses.fields(cls)
        if values and all(f.kw_only for f in fields):
            names = ", ".join(f"{f.name}=..." for f in fields)
            raise InputError(f"{cls.__name__} takes its options by name: {names}")
        cls.check_options(options)
        for f in fields:
            if f.name in options and not fits(value := options[f.name], f.type):
                raise InputError(f"{f.name}={value!r} must be {wanted(f.type)}; try {f.default!r}")
        return super().__new__(cls)

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs of a run, and of the methods beside it."""
        return frozenset()

    def options(self) -> dict[str, Any]:
        """The hyper-parameters as JSON values; `from_options(**options)` restores them."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v
            for f in dataclasses.fields(self)
        }

    @classmethod
    def renamed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options under the method's own names. Raises InputError for an unknown one."""
        own = {cls.aliases.get(name, name): value for name, value in options.items()}
        cls.check_options(own)
        return own

    @classmethod
    def check_options(cls, names: Iterable[str]) -> None:
        """Raise InputError for the name of an option that this method does not have."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in names:
            if name not in known:
                other = cls.aliases.get(name)
                hint = f"it is called {other!r} here" if other else nearest(str(name), known)
                raise InputError(f"{cls.kind} has no option {name!r}; {hint}")

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Build from JSON values, PEFT's names included. Raises InputError for an unknown name."""
        values = cls.renamed(options)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


M = TypeVar("M", bound=Method)
REGISTRY: dict[str, dict[str, type[Any]]] = {}  # axis -> kind -> class


def registering(known: dict[str, type[M]], what: str) -> Callable[[type[M]], type[M]]:
    """A class decorator that makes methods known by their `kind`, among those of one sort."""

    def register(cls: type[M]) -> type[M]:
        if not cls.kind or cls.kind in known:
            raise InputError(f"{what} needs a kind of its own, not {cls.kind!r}")
        known[cls.kind] = cls
        cls.title = cls.__dict__.get("title", cls.__name__)
        return cls

    return register


def register(cls: type[M]) -> type[M]:
    """A class decorator that makes a method known on its axis by its `kind`. Raises InputError for
    a kind that is taken."""
    return registering(REGISTRY.setdefault(cls.axis, {}), f"a value of {cls.axis!r}")(cls)


WORDS = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}
MANY = {int: "whole numbers", float: "numbers", str: "names"}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an option's type. A truth value is no number; of several words a method
    says itself which it takes."""
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin is UnionType:
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        many = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(many) == len(value) and all(map(fits, value, many))
    if origin in (int, float):
        return type(value) in (int, origin)
    return not isinstance(origin, type) or isinstance(value, origin)


def wanted(hint: Any) -> str:
    """An option's type in words."""
    if get_origin(hint) is UnionType:
        return " or ".join(map(wanted, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"{MANY[get_args(hint)[0]]} in brackets"
    return WORDS.get(hint, str(getattr(hint, "__name__", hint)))
