"""Finespun: adapt pretrained models with very few trained parameters."""

import sys
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from finespun import deprecated
from finespun.methods.index import NAMES as METHODS

if TYPE_CHECKING:
    from finespun.adapter import Adapter
    from finespun.adapters.arithmetic import Parameters, Updates
    from finespun.adapters.state import AdapterState
    from finespun.contract import Structure
    from finespun.errors import FinespunError
    from finespun.face import adapt, detach, list_adapters, load, make_trainable
    from finespun.hosts import activate, bake, disabled, evict, merge, rows, unmerge
    from finespun.lifecycle.conversion.adapter import convert
    from finespun.methods.axes import make
    from finespun.methods.index import *  # noqa: F403
    from finespun.methods.structures import STRUCTURES
    from finespun.methods.structures.lora import LoRA
    from finespun.methods.structures.lsr import LSR

__version__ = "0.2.0.dev0"
__all__ = [
    "LSR",
    "STRUCTURES",
    "Adapter",
    "AdapterState",
    "FinespunError",
    "LoRA",
    "Parameters",
    "Structure",
    "Updates",
    "activate",
    "adapt",
    "bake",
    "convert",
    "detach",
    "disabled",
    "evict",
    "list_adapters",
    "load",
    "make",
    "make_trainable",
    "merge",
    "rows",
    "unmerge",
]
_NAMES = {
    "adapter": ("Adapter",),
    "adapters.arithmetic": ("Parameters", "Updates"),
    "adapters.state": ("AdapterState",),
    "contract": ("Structure",),
    "errors": ("FinespunError",),
    "face": ("adapt", "detach", "list_adapters", "load", "make_trainable"),
    "hosts": ("activate", "bake", "disabled", "evict", "merge", "rows", "unmerge"),
    "lifecycle.conversion.adapter": ("convert",),
    "methods.axes": ("make",),
    "methods.structures": ("STRUCTURES",),
}
_HOMES = {name: f"finespun.{home}" for home, names in _NAMES.items() for name in names} | METHODS


def __getattr__(name: str) -> Any:
    """A name or subpackage, imported when it is first asked for: the command line shows its help,
    and completes a word, without loading torch."""
    if name in deprecated.RENAMED:
        new = deprecated.RENAMED[name]
        deprecated.warn(f"finespun.{name}", f"finespun.{new}")
        return attrgetter(new)(sys.modules[__name__])
    if name in _HOMES:
        found = getattr(import_module(_HOMES[name]), name)
    elif name.startswith("_"):
        raise AttributeError(f"finespun has no {name!r}")
    elif known := [n for n in METHODS if n.casefold() == name.casefold()]:
        return getattr(sys.modules[__name__], known[0])
    else:
        try:
            found = import_module(f"finespun.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"finespun.{name}":
                raise
            raise AttributeError(f"finespun has no {name!r}") from error
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *METHODS})
