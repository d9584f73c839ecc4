"""The axes as one table: what each asks, the base class of its values, and where they live.

Whatever offers methods (recipes, benches, the command line, the docs) reads this table. A value is
one registered class in a file of its axis's folder; nothing else names it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal, overload

from finespun.contract.allocation import Allocation
from finespun.contract.axis import Dynamics, Initializer, Objective
from finespun.contract.method import REGISTRY, Method
from finespun.contract.structure import Structure
from finespun.errors import InputError, nearest
from finespun.methods.index import NAMES


@dataclass(frozen=True)
class Axis:
    """One question that a method answers, by a subclass of `base` in a file of `folder`, a package
    of `finespun.methods`. A run has one value on an axis, and may have none unless it is
    `required`."""

    question: str
    base: type[Method]
    folder: str
    required: bool = False

    @property
    def name(self) -> str:
        """The recipe's key."""
        return self.base.axis

    @property
    def known(self) -> Mapping[str, type[Any]]:
        """Kind -> class of every value, those of other packages that are imported among them."""
        load(f"finespun.methods.{self.folder}")
        return REGISTRY.setdefault(self.name, {})

    def make(self, kind: str, /, **options: Any) -> Any:
        """A value by its kind and options, PEFT's names of options included. Raises InputError."""
        return self.find(kind).from_options(**options)

    def find(self, kind: object) -> type[Any]:
        """The class of a kind, in any case, with or without its hyphens; the class's own name and
        title mean it too. Raises InputError naming the nearest one."""
        if isinstance(kind, str):
            if kind in self.known:
                return self.known[kind]
            for name, cls in self.known.items():
                if plain(kind) in map(plain, (name, cls.__name__, cls.title)):
                    return cls
        raise InputError(f"no {self.name} is called {kind!r}; {nearest(str(kind), self.known)}")


STRUCTURE = Axis("how the update is written", Structure, "structures", required=True)
INITIALIZER = Axis("where the update starts", Initializer, "initializers")
ALLOCATION = Axis(
    "which layers are adapted, and how much in each, while it trains", Allocation, "allocation"
)
DYNAMICS = Axis("how a gradient becomes a step", Dynamics, "dynamics")
OBJECTIVE = Axis("what is asked besides the loss of the task", Objective, "objectives")
AXES: Mapping[str, Axis] = {
    axis.name: axis for axis in (STRUCTURE, INITIALIZER, ALLOCATION, DYNAMICS, OBJECTIVE)
}


def plain(name: str) -> str:
    """A name without case, hyphens, underscores and spaces.

    >>> plain("LoRA-XS") == plain("lora_xs")
    True
    """
    return name.casefold().translate(str.maketrans("", "", "-_ "))


@cache
def load(package: str) -> None:
    """Import every module of a folder of methods, so that its registry is full."""
    for module in iter_modules(import_module(package).__path__, f"{package}."):
        if not module.ispkg:
            import_module(module.name)


@overload
def make(kind: str, axis: Literal["structure"] = "structure", **options: Any) -> Structure:
    """A structure by name."""


@overload
def make(kind: str, axis: str, **options: Any) -> Any:
    """A value of another axis by name."""


def make(kind: str, axis: str = "structure", **options: Any) -> Any:
    """A method by name, with its options as recipes and files state them. Raises InputError.

    >>> make("lora", rank=4).options()["rank"]
    4
    """
    if axis not in AXES:
        raise InputError(f"no axis is called {axis!r}; {nearest(axis, AXES)}")
    return AXES[axis].make(kind, **options)


def axis_of(kind: str) -> Axis:
    """The axis that has a value of this kind. Raises InputError where none has, or several."""
    found = [axis for axis in AXES.values() if kind in axis.known]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{kind!r} is on several axes: {', '.join(a.name for a in found)}")
    every = [known for axis in AXES.values() for known in axis.known]
    raise InputError(f"no method is called {kind!r}; {nearest(kind, every)}")


def names_of(package: str) -> Callable[[str], Any]:
    """`__getattr__` of a folder of methods: a class is imported from its own file when it is asked
    for, and no other."""

    def find(name: str) -> Any:
        home = NAMES.get(name, "")
        if home.rpartition(".")[0] != package:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home), name)

    return find
