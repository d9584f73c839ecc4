"""Buffers of the base that training moves, running statistics above all: whose values stand there.

Every adapter has values of its own; the model holds those of the adapter that acts, by pointer, and
the base's are kept aside. So nothing that a training pass writes reaches the base.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from finespun.errors import InputError, StateError

Place = tuple[str, str]  # the module's name and the buffer's own
ROOT = "."  # the name of the model itself
NOBODY = ""  # owns what stands inside disabled(): it goes when the block ends


class Buffers:
    """The watched buffers of one model. `base` and `own` (adapter -> values) say what belongs to
    whom, `stands` whose values the model holds; where it names nobody, the base's."""

    def __init__(self) -> None:
        self.holders: dict[Place, nn.Module] = {}
        self.base: dict[Place, Tensor] = {}
        self.own: dict[str, dict[Place, Tensor]] = {}
        self.stands: dict[Place, str] = {}
        self.trained = NOBODY

    def watch(self, known: dict[str, nn.Module], places: Iterable[Place] | None = None) -> None:
        """From now on keep the base's values at these places, or wherever training may move them.
        Raises InputError for a place that the model lacks."""
        for name, leaf in movable(known) if places is None else places:
            holder = known.get(name)
            buffer = None if holder is None else holder._buffers.get(leaf)
            if holder is None or buffer is None:
                raise InputError(f"the model has no buffer {leaf!r} in {name!r}")
            if (name, leaf) not in self.holders:
                self.holders[name, leaf] = holder
                self.base[name, leaf] = buffer

    def begin(self, name: str, known: dict[str, nn.Module]) -> None:
        """Adapter `name` will be trained: it gets values of its own, now the base's."""
        self.watch(known)
        if self.holders:
            self._read()
            own = self.own.setdefault(name, {})
            for place, value in _copies(self.base).items():
                own.setdefault(place, value)
            self.trained = name

    def moved(self, name: str) -> dict[Place, Tensor]:
        """What training made of the buffers under this adapter, where it is not the base's."""
        if name not in self.own:
            return {}
        self._read()
        return {p: t for p, t in self.own[name].items() if not _alike(t, self.base[p])}

    def check(self, values: dict[Place, Tensor]) -> None:
        """Raise InputError for values at a place that is not watched, or of another shape."""
        for place, value in values.items():
            base, told = self.base.get(place), ".".join(place)
            if base is None:
                raise InputError(f"buffer {told} belongs to nothing here")
            if base.shape != value.shape:
                raise InputError(f"buffer {told} is {tuple(value.shape)}, not {tuple(base.shape)}")

    def give(self, name: str, values: dict[Place, Tensor]) -> None:
        """Adapter `name` has these values, and the base's elsewhere: they are copied into what is
        there."""
        self._read()
        own = self.own.get(name, {})
        with torch.no_grad():
            for place in {*own, *values}:
                value = values.get(place, self.base[place])
                if place in own:
                    own[place].copy_(value)
                else:
                    own[place] = value.to(self.base[place], copy=True)
        if own:
            self.own[name] = own

    def choice(self, names: Iterable[str]) -> dict[Place, str]:
        """Whose values stand while these adapters act: of what one of them moved, its own, else
        those of the one that is trained. Raises StateError where two moved the same buffer."""
        acting = [name for name in dict.fromkeys(names) if name in self.own]
        if len(acting) == 1:
            return dict.fromkeys(self.own[acting[0]], acting[0])
        found: dict[Place, str] = {}
        if self.trained in acting:
            found = dict.fromkeys(self.own[self.trained], self.trained)
        taken: dict[Place, str] = {}
        for name in acting:
            for place in self.moved(name):
                other = taken.setdefault(place, name)
                if other != name:
                    raise StateError(
                        f"{other!r} and {name!r} both moved the buffer {'.'.join(place)}: activate "
                        "one of them"
                    )
        return found | taken

    def of_rows(self, names: Iterable[str | None]) -> dict[Place, str]:
        """Whose values stand while rows have adapters of their own: of one for all rows, its own,
        else nobody's. Raises StateError where rows would need two values at once."""
        distinct = set(names)
        served = [name for name in distinct if name in self.own]
        if len(distinct) == 1 and served:
            return self.choice(str(name) for name in served)
        for name in served:
            for place in self.moved(str(name)):
                raise StateError(
                    f"{name!r} moved the buffer {'.'.join(place)}, which all rows of a batch "
                    "share: give it batches of its own"
                )
        return self.aside()

    def aside(self) -> dict[Place, str]:
        """The choice of nobody: the base's values stand, and what moves them is forgotten."""
        if self.holders:
            self._read()
            self.own[NOBODY] = _copies(self.base)
        return dict.fromkeys(self.base, NOBODY)

    def put(self, stands: dict[Place, str]) -> None:
        """Let these values stand in the model."""
        if not self.holders:
            return
        self._read()
        for (name, leaf), holder in self.holders.items():
            owner = stands.get((name, leaf))
            values = self.base if owner is None else self.own[owner]
            holder._buffers[leaf] = values[name, leaf]
        self.stands = stands
        if NOBODY not in stands.values():
            self.own.pop(NOBODY, None)

    def forget(self, name: str) -> None:
        """An adapter leaves, with its values."""
        if name in self.own:
            self.put({place: owner for place, owner in self.stands.items() if owner != name})
            del self.own[name]
        if self.trained == name:
            self.trained = NOBODY

    def keep(self) -> None:
        """What stands in the model is the base's from now on."""
        self._read()
        for place, owner in self.stands.items():
            self.base[place] = self.own[owner][place]
        self.stands = {}

    def as_of(self, names: Iterable[str]) -> dict[Place, Tensor]:
        """What would stand while these adapters act."""
        self._read()
        stands = self.choice(names)
        return {p: self.own[stands[p]][p] if p in stands else v for p, v in self.base.items()}

    def convert(self, change: Callable[[Tensor], Tensor]) -> None:
        """`model.to(...)` went over what stands in the model: do it to what is kept aside."""
        self._read()
        for owner, values in ((None, self.base), *self.own.items()):
            for place in values:
                if self.stands.get(place) != owner:
                    values[place] = change(values[place])

    def _read(self) -> None:
        """Take notice of tensors that took the place of others in the model."""
        for place, holder in self.holders.items():
            live, owner = holder._buffers.get(place[1]), self.stands.get(place)
            if live is not None:
                (self.base if owner is None else self.own[owner])[place] = live


def movable(known: dict[str, nn.Module]) -> list[Place]:
    """Buffers that training may move and a checkpoint holds: floats and single counters."""
    return [
        (name, leaf)
        for name, module in known.items()
        for leaf, value in module._buffers.items()
        if value is not None
        and leaf not in module._non_persistent_buffers_set
        and not value.is_meta
        and (value.is_floating_point() or value.is_complex() or value.numel() == 1)
    ]


def _copies(values: dict[Place, Tensor]) -> dict[Place, Tensor]:
    """A copy of each; what two modules share, they go on sharing."""
    made = {id(value): value.detach().clone() for value in values.values()}
    return {place: made[id(value)] for place, value in values.items()}


def _alike(one: Tensor, other: Tensor) -> bool:
    other = other.to(one)
    return torch.equal(one, other) or torch.equal(_bits(one), _bits(other))


def _bits(value: Tensor) -> Tensor:
    """Bytes, so that NaN is equal to itself."""
    return value.contiguous().view(-1).view(torch.uint8)
