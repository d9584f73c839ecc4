"""What is asked of training besides the loss of the task."""

from typing import TYPE_CHECKING

from finespun.methods.axes import names_of

if TYPE_CHECKING:
    from finespun.methods.index import *  # noqa: F403

__getattr__ = names_of(__name__)
