"""What a layer does with what hangs in its slots; see `hosts/slots.py`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from finespun.contract import Delta
from finespun.contract.training import Member, Mixer
from finespun.errors import StateError
from finespun.hosts.adapter_set import AdapterSet
from finespun.hosts.slots import SiteSlots

Base = Callable[..., Any]


class Slotted:
    """The part of a host that reads its slots, at every call and without a cache."""

    name: str
    slots: SiteSlots
    adapter_set: AdapterSet

    def held(self) -> Mapping[str, Delta]:
        raise NotImplementedError

    def change(self, delta: Delta, strength: float, x: Tensor, base: Base) -> Tensor:
        raise NotImplementedError

    def _owner(self, delta: Delta) -> str:
        return str(delta.__dict__["owner"])

    def _gain(self, delta: Delta) -> Tensor | None:
        return self.slots.gains.get(self._owner(delta)) if self.slots.gains else None

    def _overlaid(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        overlay = self.slots.overlays.get(adapter)
        if overlay is None or self.adapter_set.attached[adapter].strength == 0.0:
            return y
        added = overlay(x)
        return y if added is None else y + added.to(y.dtype)

    def _mixer(self, active: Sequence[tuple[Delta, float]]) -> Mixer | None:
        """What mixes the active adapters here: a slot's, or the module that one of them holds."""
        for delta, _ in active:
            held = self.slots.mixers.get(self._owner(delta)) or delta._modules.get("mixer")
            if held is not None:
                return held
        return None

    def _members(
        self, mixer: Mixer, active: Sequence[tuple[Delta, float]], base: Base
    ) -> dict[str, Member]:
        """The changes that a mixer mixes, by adapter: those that it names, else all active ones."""
        named: Sequence[str] | None = getattr(mixer, "members", None)
        if named is not None:
            found = self.held()
            for name in named:
                if name not in found:
                    raise StateError(
                        f"the mixer at {self.name!r} mixes {name!r}, which has no modules there: "
                        f"load it, and activate it once, before {self._owner(active[0][0])!r}"
                    )
            active = [(found[n], self.adapter_set[n].strength) for n in named]
        return {self._owner(d): partial(self.change, d, c, base=base) for d, c in active}

    def _routed(
        self, y: Tensor, numbers: Tensor, x: Tensor, delta: Delta, strength: float, base: Base
    ) -> Tensor:
        """y with one adapter's part in the rows `numbers`, which were given x."""
        name, mixer = self._owner(delta), self._mixer([(delta, strength)])
        if mixer is None and name not in self.slots.overlays:
            change = self.change(delta, strength, x, base)
            return y.index_add(0, numbers, change.to(y.dtype))
        own = y.index_select(0, numbers)
        if mixer is None:
            mixed = own + self.change(delta, strength, x, base).to(y.dtype)
        else:
            mixed = mixer(x, own, self._members(mixer, [(delta, strength)], base))
        return y.index_copy(0, numbers, self._overlaid(mixed, x, name).to(y.dtype))
