"""The model that PEFT's loaders are handed, where it is a part of the one that was adapted."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from finespun.errors import InputError
from finespun.hosts import modules


class Root(NamedTuple):
    """A model and the beginning of its modules' names in the whole, "" where it is the whole."""

    model: nn.Module
    prefix: str

    def name(self, whole: str) -> str:
        """The name of a module, from the root."""
        return whole.removeprefix(self.prefix)


def root_of(model: nn.Module, places: Iterable[str]) -> Root:
    """The transformer inside a SentenceTransformer, whose `load_adapter` and `save` know names from
    there alone, else the model itself. Raises InputError naming places outside the transformer."""
    if not isinstance(getattr(type(model), "transformers_model", None), property):
        return Root(model, "")
    inner = getattr(model, "transformers_model", None)
    name = next((n for n, m in modules(model).items() if m is inner), None)
    if inner is None or name is None:
        return Root(model, "")
    outside = [p for p in places if not p.startswith(f"{name}.")]
    if outside:
        raise InputError(
            f"{outside[0]!r} lies outside {name!r}, and load_adapter of a {type(model).__name__} "
            "reaches nothing else: leave it out of the targets, or merge and save the model"
        )
    return Root(inner, f"{name}.")
