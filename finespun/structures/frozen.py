"""Frozen random numbers: drawn from a portable stream when first read, shared, never saved."""

from collections.abc import Callable
from typing import Any
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
_drawn: "WeakValueDictionary[tuple[Any, ...], Tensor]" = WeakValueDictionary()


class Frozen:
    """A tensor of `shape` fixed by (law, seed, stream): equal keys share one tensor per device.

    `law` is "normal" (mean 0, variance 1), "uniform" ([0, 1)) or "symmetric" ([-1, 1)); `stream` is
    a (site, purpose) pair as in `linalg.streams.key`. Read it with `on(device)` or `like(tensor)`.
    Copies and pickles hold the key only.
    """

    def __init__(
        self, law: str, seed: int, stream: tuple[str, str], shape: tuple[int, ...]
    ) -> None:
        self.key = (law, seed, stream, tuple(shape))
        self._held: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.key[3]

    def on(self, device: torch.device | str = "cpu") -> Tensor:
        """The tensor on a device, drawn once and kept while anybody holds this object."""
        device = torch.device(device)
        if self._held is not None and self._held.device == device:
            return self._held
        place = (*self.key, device)
        held = _drawn.get(place)
        if held is None:
            law, seed, stream, shape = self.key
            with torch.inference_mode(False):
                held = DRAWS[law](streams.key(seed, *stream), shape).to(device)
            _drawn[place] = held
        self._held = held
        return held

    def like(self, other: Tensor) -> Tensor:
        """The tensor on the device and in the dtype of another."""
        return self.on(other.device).to(other.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return Frozen, self.key
