"""Where an update starts: what an adapter's parameters are before the first step."""

from typing import TYPE_CHECKING

from finespun.methods.axes import names_of

if TYPE_CHECKING:
    from finespun.methods.index import *  # noqa: F403

__getattr__ = names_of(__name__)
