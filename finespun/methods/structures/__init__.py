"""How ΔW is written: one file a method, pure mathematics on tensors and shapes."""

from typing import TYPE_CHECKING, Any

from finespun.methods.axes import AXES, names_of

if TYPE_CHECKING:
    from finespun.methods.index import *  # noqa: F403

_named = names_of(__name__)


def __getattr__(name: str) -> Any:
    return AXES["structure"].known if name == "STRUCTURES" else _named(name)
