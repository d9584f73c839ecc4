"""What stands at one layer beside its deltas: gains, overlays and mixers, by adapter.

Layers read plain dictionaries at every call. Who put what there is kept beside, so that the slots
of one owner can be taken away without those of another.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from finespun.contract.training import Mixer
from finespun.errors import InputError, StateError

Kind = Literal["gain", "overlay", "mixer"]
Added = Callable[[Tensor], Tensor | None]


class SiteSlots:
    """The slots of one site.

    `gains` (scalar or (out,)) scale what reaches an adapter's trained parameters; `overlays` add a
    term that is never saved or merged (None: nothing this time); a mixer forms the output from the
    base's and the active adapters' changes. Copies and pickles of a layer have empty slots; a mixer
    that lives at inference is a module of its delta instead (`contract.mixing`).
    """

    def __init__(self) -> None:
        self.gains: dict[str, Tensor] = {}
        self.overlays: dict[str, Added] = {}
        self.mixers: dict[str, Mixer] = {}
        self._placed: dict[tuple[Kind, str], dict[str, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SiteSlots":
        return SiteSlots()

    def __reduce__(self) -> tuple[type["SiteSlots"], tuple[()]]:
        return SiteSlots, ()

    def put(self, kind: Kind, adapter: str, owner: str, value: Any) -> None:
        """Let `owner` have this value in a slot of an adapter; None takes it away. Raises
        StateError for a second mixer at the site."""
        if kind == "mixer" and value is not None:
            for (other, name), owners in self._placed.items():
                if other == "mixer" and (name != adapter or owners.keys() - {owner}):
                    raise StateError(f"{name!r} has a mixer there already; one fits at a site")
        owners = self._placed.setdefault((kind, adapter), {})
        if value is None:
            owners.pop(owner, None)
        else:
            owners[owner] = value
        self._combine(kind, adapter, list(owners.values()))
        if not owners:
            del self._placed[kind, adapter]

    def free(self, owner: str) -> None:
        """Take away all that `owner` has put here."""
        for kind, adapter in [key for key, owners in self._placed.items() if owner in owners]:
            self.put(kind, adapter, owner, None)

    def _combine(self, kind: Kind, adapter: str, values: list[Any]) -> None:
        held: dict[str, Any] = getattr(self, f"{kind}s")
        if not values:
            held.pop(adapter, None)
        elif kind == "gain":
            held[adapter] = reduce(torch.mul, values)
        elif kind == "overlay" and len(values) > 1:
            held[adapter] = _Sum(values)
        else:
            held[adapter] = values[0]


class _Sum:
    """Several overlays as one."""

    def __init__(self, parts: list[Added]) -> None:
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor | None:
        terms = [term for part in self.parts if (term := part(x)) is not None]
        return reduce(torch.add, terms) if terms else None


def checked_gain(value: Any, out: int, site: str) -> Tensor:
    """A gain, detached. Raises InputError unless it is a scalar or (out,) and finite."""
    if not isinstance(value, Tensor) or tuple(value.shape) not in ((), (out,)):
        seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the gain at {site!r} is {seen}; it must be a tensor, () or ({out},)")
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"the gain at {site!r} is not finite")
    return value.detach()
