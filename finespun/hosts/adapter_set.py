"""The adapter set: one model's registered adapters, which of them are active, and for which rows.

Layers read it on every forward pass; switching between activated adapters changes this object only.
"""

import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, get_ident
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from finespun.adapters.state import AdapterState
from finespun.errors import InputError, StateError, nearest
from finespun.hosts.attached import Attached
from finespun.hosts.buffers import Buffers
from finespun.hosts.stack import Blocks

Weights = tuple[tuple[str, float], ...]
LOCK = Lock()
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Patch:
    """Values (K,) at the entries `index` (K,), counted row by row, of a weight (out, in); `written`
    took their place, in the dtype of the weight, and stands there unless somebody edits it."""

    index: Tensor
    values: Tensor
    written: Tensor | None = None


Kept = tuple[Tensor, Tensor | None] | Patch


@dataclass(frozen=True)
class Rows:
    """Which adapter serves which part of a batch: names[i] for row i, or for the next `repeat`
    rows, or for the next lengths[i] positions of a packed batch; None is the base."""

    names: tuple[str | None, ...]
    lengths: tuple[int, ...] | None = None
    repeat: int = 1
    found: dict[Any, list[tuple[str, Tensor]]] = field(default_factory=dict, compare=False)

    def index(self, count: int, module: str, device: torch.device) -> list[tuple[str, Tensor]]:
        """For `count` rows or positions: each adapter's numbers, those of the base left out.

        Rows are repeated as blocks where a layer sees a multiple of those that the model was given
        (beams, flattened tokens). Raises StateError where they cannot be mapped.
        """
        if (count, device) not in self.found:
            self.found[count, device] = self._map(count, module, device)
        return self.found[count, device]

    def check(self, count: int, several: bool) -> None:
        """Raise StateError unless a batch of `count` rows is what the names say; `several` allows
        any multiple of it."""
        said = len(self.names) * self.repeat
        if self.lengths is None and count != said and not (several and said and count % said == 0):
            times = count // max(len(self.names), 1)
            hint = f"repeat={times} if each serves {times} rows in turn, or name every row"
            fits = self.names and count % len(self.names) == 0
            raise StateError(
                f"the model was given {count} rows while rows() names {said}: "
                + (hint if fits else "give one name, or None, for each row")
            )

    def _map(self, count: int, module: str, device: torch.device) -> list[tuple[str, Tensor]]:
        if self.lengths is not None and count != sum(self.lengths):
            raise StateError(
                f"{module!r} was given {count} positions while rows() has lengths for "
                f"{sum(self.lengths)}: they cannot be distinguished here"
            )
        if not self.names or (count % len(self.names) and self.lengths is None):
            raise StateError(
                f"{module!r} was given {count} rows while rows() names {len(self.names)}: "
                "they cannot be distinguished here"
            )
        lengths = self.lengths or (count // len(self.names),) * len(self.names)
        numbers: dict[str, list[Tensor]] = {}
        end = 0
        for name, length in zip(self.names, lengths):
            if name is not None:
                numbers.setdefault(name, []).append(torch.arange(end, end + length))
            end += length
        return [(name, torch.cat(parts).to(device)) for name, parts in numbers.items()]


class AdapterSet:
    """Shared by all adapted layers of one model.

    `states` has every registered adapter: the state that it was registered as, or None for one that
    was made here and has not slept yet. `attached` has those whose modules stand in the model.
    `rows` and `disabled` change what every layer does, so one thread at a time may use them, and
    none while another runs the model: `enter` and `guard` refuse with StateError. `owner` is the
    thread that changes it and how many changes of its own it is inside of; `running` holds, by
    thread, the call frames of the forward passes under way, so that one that was killed counts no
    longer.
    """

    def __init__(self) -> None:
        self.states: dict[str, AdapterState | None] = {}
        self.attached: dict[str, Attached] = {}
        self.active: Weights = ()
        self.rows: Rows | None = None
        self.blocks = Blocks()
        self.merged: dict[str, float] = {}
        self.kept: dict[str, Kept] | None = None
        self.broken = False  # a merge in place stopped half-way
        self.gathered: str | None = None
        self.owner: tuple[int, int] | None = None
        self.running: dict[int, list[int]] = {}
        self.buffers = Buffers()
        self.several = False
        self.traced: tuple[Weights, Rows | None] | None = None

    def enter(self) -> None:
        """This thread begins a forward pass of the root."""
        me, caller = get_ident(), sys._getframe(2)
        with LOCK:
            if self.owner is not None and self.owner[0] != me:
                raise StateError(
                    "another thread is inside rows() or disabled() on this model: wait"
                )
            frames = self.running.pop(me, [])
            if frames:
                frames = _on_stack(caller.f_back, frames)
            self.running[me] = [*frames, id(caller)]
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self.traced = self.in_force(), self.rows

    def check_recomputed(self) -> None:
        """Raise StateError where a backward pass would recompute activations with other adapters,
        strengths or rows than the last forward pass had: its gradients would be another model's."""
        if torch._C._current_graph_task_id() == -1 or self.traced is None:
            return
        if self.traced != (self.in_force(), self.rows):
            raise StateError(
                "the backward pass recomputes activations, but what is active has changed since "
                "the forward pass: call backward() before activate(), and inside rows()"
            )

    def leave(self) -> None:
        """This thread has ended a forward pass of the root."""
        me = get_ident()
        with LOCK:
            frames = self.running.pop(me, [])[:-1]
            if frames:
                self.running[me] = frames

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around a change of what the layers do."""
        me = get_ident()
        with LOCK:
            owner, depth = self.owner or (me, 0)
            if owner != me or self._elsewhere(me):
                raise StateError(
                    "another thread is using this model: wait before changing what it does"
                )
            self.owner = me, depth + 1
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        with LOCK:
            if self.owner is not None:
                owner, depth = self.owner
                self.owner = (owner, depth - 1) if depth > 1 else None

    def _elsewhere(self, me: int) -> bool:
        """Whether another thread runs the model: passes that ended silently, by an interrupt
        or because a fork left their thread behind, are struck off."""
        others = self.running.keys() - {me}
        stacks = sys._current_frames() if others else {}
        for thread in others:
            frames = _on_stack(stacks.get(thread), self.running[thread])
            if frames:
                self.running[thread] = frames
            else:
                del self.running[thread]
        return bool(self.running.keys() - {me})

    def settle_buffers(self) -> None:
        """Let those values of watched buffers stand that belong to what acts now."""
        if not self.buffers.holders:
            return
        if self.rows is not None:
            self.buffers.put(self.buffers.of_rows(self.rows.names))
        elif any(block.kind == "disabled" for block in self.blocks):
            self.buffers.put(self.buffers.aside())
        else:
            self.buffers.put(self.buffers.choice(n for n, _ in self.active))

    def used(self, name: str) -> bool:
        """Whether the adapter acts: it is active, merged, or serves rows."""
        acts = name in self.merged or any(name == n for n, _ in self.active)
        return acts or self.serves(name)

    def serves(self, name: str) -> bool:
        """Whether the adapter serves rows, or will when the blocks that the model is inside of
        end."""
        return any(name in block.names for block in self.blocks)

    @property
    def for_good(self) -> bool:
        """Whether what is merged cannot be taken out."""
        return bool(self.merged) and self.kept is None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are inside of no block, and nobody runs or changes them."""
        free: dict[str, Any] = {
            "rows": None,
            "owner": None,
            "running": {},
            "several": False,
            "traced": None,
        }
        return {**self.__dict__, **free}

    def check_known(self, name: str) -> None:
        """Raise InputError where no adapter has this name."""
        if name not in self.states:
            raise InputError(f"no adapter is called {name!r}; {nearest(name, self.states)}")

    def __getitem__(self, name: str) -> Attached | AdapterState:
        """A live adapter's modules, or the state of one that sleeps. Raises InputError where none
        has this name."""
        self.check_known(name)
        found = self.attached.get(name) or self.states[name]
        if found is None:
            raise StateError(f"{name!r} has no modules yet: another call is attaching it")
        return found

    def weights(self, wanted: str | Sequence[str] | Mapping[str, float] | None) -> Weights:
        """What the user asked for as (name, weight) pairs, names checked."""
        if wanted is None:
            wanted = ()
        if isinstance(wanted, str):
            wanted = {wanted: 1.0}
        if not isinstance(wanted, Sequence | Mapping):
            raise InputError(f"activate takes a name, names or name: weight, not {wanted!r}")
        if not isinstance(wanted, Mapping):
            wanted = dict.fromkeys(wanted, 1.0)
        for name, weight in wanted.items():
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise InputError(f"weight {weight!r} of {name!r} must be a finite number; try 1.0")
        return tuple((self[name].name, float(weight)) for name, weight in wanted.items())

    def in_force(self) -> Weights:
        """The active adapters that are not merged into the weights, strengths included."""
        return tuple(
            (name, weight * self.attached[name].strength)
            for name, weight in self.active
            if name not in self.merged
        )


def _on_stack(frame: FrameType | None, wanted: list[int]) -> list[int]:
    """Those of the wanted call frames that a thread, at `frame`, is still inside of, in order."""
    found = set()
    while frame is not None:
        found.add(id(frame))
        frame = frame.f_back
    return [number for number in wanted if number in found]


def _unlock() -> None:
    """After a fork: the thread that held the lock may not be here."""
    global LOCK
    LOCK = Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_unlock)


def adapter_set_of(model: nn.Module) -> AdapterSet:
    """The model's adapter set. Raises StateError when nothing was ever adapted."""
    adapter_set = model.__dict__.get("_finespun_adapters")
    if not isinstance(adapter_set, AdapterSet):
        raise StateError(f"this {type(model).__name__} has no adapters; adapt or load one first")
    return adapter_set


def alone(change: F) -> F:
    """Refuse a change of a model, its first argument, while another thread runs it: StateError."""

    @functools.wraps(change)
    def guarded(model: nn.Module, *args: Any, **options: Any) -> Any:
        with adapter_set_of(model).guard():
            return change(model, *args, **options)

    return cast(F, guarded)
