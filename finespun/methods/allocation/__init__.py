"""Which layers are adapted, and how much in each: choices that are made during training."""

from typing import TYPE_CHECKING

from finespun.methods.axes import names_of

if TYPE_CHECKING:
    from finespun.methods.index import *  # noqa: F403

__getattr__ = names_of(__name__)
