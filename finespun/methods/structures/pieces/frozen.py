"""Frozen random numbers: drawn from a portable stream when first read, shared, never saved."""

from collections.abc import Callable
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from finespun.linalg import streams

Draw = Callable[[tuple[int, int], tuple[int, ...]], Tensor]
DRAWS: dict[str, Draw] = {
    "normal": streams.normal,
    "uniform": streams.uniform,
    "symmetric": lambda key, shape: 2 * streams.uniform(key, shape) - 1,
}
_known: "WeakValueDictionary[tuple[Any, ...], Frozen]" = WeakValueDictionary()


def not_compiled(function: Callable[..., Any]) -> None:
    """Let compiled code leave its graph for `function`. It sets the mark of torch.compiler.disable,
    which itself would load the whole compiler on import."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]


class Frozen:
    """A tensor of `shape` fixed by (law, seed, stream): equal keys are one object, which holds one
    tensor per device.

    `law` is "normal" (mean 0, variance 1), "uniform" ([0, 1)) or "symmetric" ([-1, 1)), or one that
    a structure adds to DRAWS; `stream` is a (site, purpose) pair as in `linalg.streams.key`. Read
    it with `on(device)` or `like(tensor)`. Pickles hold the key only.
    """

    key: tuple[str, int, tuple[str, str], tuple[int, ...]]
    held: dict[torch.device, Tensor]

    def __new__(cls, law: str, seed: int, stream: tuple[str, str], shape: tuple[int, ...]) -> Self:
        key = (law, seed, stream, tuple(shape))
        found = _known.get((cls, *key))
        if not isinstance(found, cls):
            found = super().__new__(cls)
            found.key, found.held = key, {}
            _known[(cls, *key)] = found
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        return self.key[3]

    def on(self, device: torch.device | str = "cpu") -> Tensor:
        """The tensor on a device, drawn once and kept while anybody holds this object. Where it was
        never read before, compilation breaks its graph here, the first time."""
        device = torch.device(device)
        held = self.held.get(device)
        return self._draw(device) if held is None else held

    def _draw(self, device: torch.device) -> Tensor:
        law, seed, stream, shape = self.key
        with torch.inference_mode(False):
            self.held[device] = DRAWS[law](streams.key(seed, *stream), shape).to(device)
        return self.held[device]

    not_compiled(_draw)

    def like(self, other: Tensor) -> Tensor:
        """The tensor on the device and in the dtype of another."""
        return self.on(other.device).to(other.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Frozen, self.key
