"""Names of 0.1 that still work in 0.2, each with a DeprecationWarning that says the new one."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# What was called NAME in 0.1 -> where it is now, seen from `finespun`.
RENAMED: Mapping[str, str] = {
    "structure": "make",
    "structures": "methods.structures",
    "train": "training",
}
# Keys of recipes and bench files, by section.
KEYS: Mapping[str, Mapping[str, str]] = {
    "Recipe": {"train": "train_modules"},
    "Training": {"rate": "lr"},
    "BenchSpec": {"rates": "lrs"},
    "Member": {
        "numbers": "num_parameters",
        "rate": "lr",
        "rates": "lrs",
        "rate_of": "lr_of",
        "rate_power": "lr_power",
    },
}


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Say that `old` is called `new` now."""
    warnings.warn(
        f"{old} is called {new} since 0.2; the old name goes in 0.3",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function still takes its old keyword (name -> new name), with a warning.

    Raises TypeError where the old and the new one are both given.
    """

    def around(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__name__} was given {old} and {new}; keep {new}")
                warn(f"{function.__name__}({old}=...)", f"{new}=...")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return around


def rename_keys(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section of a recipe or bench file under their new names, with a warning for
    each that was renamed; one that is given both ways stays, for the check of unknown keys."""
    names, found = KEYS.get(section, {}), dict(values)
    for old, new in names.items():
        if old in found and new not in found:
            warn(f"the key {old!r}", repr(new), stacklevel=4)
            found[new] = found.pop(old)
    return found
