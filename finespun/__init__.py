"""Finespun: adapt pretrained models with very few trained numbers."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finespun.adapter import Adapter, adapt, load
    from finespun.convert.convert import convert
    from finespun.errors import FinespunError
    from finespun.hosts import activate, disabled, evict, rows
    from finespun.structures import LSR, STRUCTURES, LoRA, Structure, structure

__version__ = "0.1.0.dev0"
__all__ = [
    "LSR",
    "STRUCTURES",
    "Adapter",
    "FinespunError",
    "LoRA",
    "Structure",
    "activate",
    "adapt",
    "convert",
    "disabled",
    "evict",
    "load",
    "rows",
    "structure",
]
_NAMES = {
    "adapter": ("Adapter", "adapt", "load"),
    "convert.convert": ("convert",),
    "errors": ("FinespunError",),
    "hosts": ("activate", "disabled", "evict", "rows"),
    "structures": ("LSR", "STRUCTURES", "LoRA", "Structure", "structure"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


class _Package(ModuleType):
    """This package, whose names and subpackages are imported when they are first asked for: the
    command line shows its help, and completes a word, without loading torch."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            found = getattr(import_module(f"finespun.{_HOMES[name]}"), name)
        elif name.startswith("_"):
            raise AttributeError(f"finespun has no {name!r}")
        else:
            try:
                found = import_module(f"finespun.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"finespun.{name}":
                    raise
                raise AttributeError(f"finespun has no {name!r}") from error
        super().__setattr__(name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        """Importing the package finespun.convert does not put it in the place of `fs.convert`."""
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
