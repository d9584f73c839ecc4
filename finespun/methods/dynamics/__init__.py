"""How a gradient becomes a step: maps of gradients, and optimisers of their own."""

from typing import TYPE_CHECKING

from finespun.methods.axes import names_of

if TYPE_CHECKING:
    from finespun.methods.index import *  # noqa: F403

__getattr__ = names_of(__name__)
