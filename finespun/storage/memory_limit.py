"""A bound on what is built from sizes that a file states: no file makes us take all the memory."""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from finespun.errors import FileError

SHARE = 4  # a single tensor may take one part in four of the machine's memory
UNKNOWN = 8 << 30  # bytes of memory taken for granted where the system gives none
SMALL = 1 << 24  # numbers: operations whose output must be smaller are not looked at
_ITEM = 8  # bytes of the largest usual number


@functools.cache
def memory() -> int:
    """Bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN


@contextmanager
def bounded(where: str, most: int | None = None) -> Iterator[None]:
    """Inside, no operation may make a tensor of more than `most` bytes (a quarter of the memory
    unless given). Raises FileError, beginning with `where`, before the memory is taken."""
    with _Bound(where, memory() // SHARE if most is None else most):
        yield


class _Bound(TorchDispatchMode):
    def __init__(self, where: str, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where, self.most = where, most

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would load the whole compiler, a second's work, to leave this uncompiled; nothing
        is compiled here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not func._schema.is_mutable:
            size = _bytes(func, args, kwargs)
            if size > self.most:
                raise FileError(
                    f"{self.where}: a tensor of {size:,} bytes would be made; at most "
                    f"{self.most:,} are allowed here"
                )
        return func(*args, **kwargs)


def _bytes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The bytes of what an operation makes, known without making it; 0 where it is small."""
    leaves = tree_leaves((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = [leaf for leaf in leaves if type(leaf) is int]
    most = math.prod(max(1, t.numel()) for t in inputs) * math.prod(max(1, abs(n)) for n in sizes)
    if most <= SMALL:
        return 0
    if not inputs:
        return _made(args, most)
    try:
        with torch.no_grad():
            made = func(*tree_map(_shape_only, args), **tree_map(_shape_only, dict(kwargs)))
    except (NotImplementedError, RuntimeError):
        return 0  # it says itself what is wrong, or needs values and makes no more than it has
    return max((t.nbytes for t in tree_leaves(made) if isinstance(t, Tensor)), default=0)


def _made(args: tuple[Any, ...], most: int) -> int:
    """Bytes that a call such as zeros([2, 3]) or arange(0, 9) makes."""
    if args and isinstance(args[0], list | tuple):
        return math.prod(int(n) for n in args[0]) * _ITEM
    numbers = [abs(n) for n in args if isinstance(n, int | float)]
    return int(max(numbers, default=most)) * _ITEM


def _shape_only(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
