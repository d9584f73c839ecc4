"""Hooks on modules that copies and pickles of a model do not carry with them."""

from collections.abc import Callable
from typing import Any

import torch


class Watch:
    """Calls a function, outside of compiled graphs; a copy of it, made with the module that it
    hangs on, calls nothing."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = None if function is None else torch.compiler.disable(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.function is None else self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watch":
        return Watch()

    def __reduce__(self) -> tuple[type["Watch"], tuple[()]]:
        return Watch, ()
