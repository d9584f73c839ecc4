"""All layers' factors in one product: when they are formed, and how long they stay valid."""

from collections.abc import Sequence
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from finespun.contract import Delta, Structure

Factors = tuple[Tensor, Tensor]
LOCK = Lock()
_steps = 0


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class FactorCache:
    """Forms A and B of all deltas of one adapter by `structure.form`, once per forward pass.

    With gradients they are formed when the root module is entered, and recomputation inside a
    backward pass reuses them; where the root is not entered (a method beside forward, a part called
    on its own) every layer forms its own, as it does under compilation and torch.func transforms,
    in a second thread while a first is inside, and in the recomputation of layers that ran without
    gradients inside a pass that has them: reentrant checkpointing. Without gradients they stay
    until a trained parameter changes.
    """

    def __init__(self, structure: Structure, deltas: Sequence[Delta]) -> None:
        self.__setstate__({"structure": structure, "deltas": list(deltas)})

    def __getstate__(self) -> dict[str, Any]:
        return {"structure": self.structure, "deltas": self.deltas}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.structure: Structure = state["structure"]
        self.deltas: list[Delta] = state["deltas"]
        self.place = {id(delta): i for i, delta in enumerate(self.deltas)}
        self.formed: list[Factors] = []
        self.still: list[Factors] = []
        self.versions: list[tuple[object, ...]] = []
        self.owner: int | None = None
        self.grown = False
        self.blind: set[int] = set()

    @property
    def inside(self) -> bool:
        """Whether a forward pass of the root is under way."""
        return self.owner is not None

    def enter(self) -> None:
        """The root module begins a forward pass."""
        if _traced():
            return
        with LOCK:
            if self.owner not in (None, get_ident()):
                return
            self.owner = get_ident()
        self.grown = torch.is_grad_enabled()
        if self.grown:
            self.blind.clear()
            self.versions = []
            self.formed = self._form()
        elif not all(map(self._current, range(len(self.deltas)))):
            self._settle()

    def leave(self) -> None:
        """The root module has ended a forward pass, normally or by an exception."""
        if not _traced() and self.owner == get_ident():
            self.owner = None

    def factors(self, delta: Delta) -> Factors | None:
        """A and B of one delta, gate and exact start applied, or None: form it alone."""
        if _traced():
            return None
        place = self.place.get(id(delta))
        if place is None:
            return None
        mine, grad, recomputing = self.owner == get_ident(), torch.is_grad_enabled(), _recomputing()
        if recomputing:
            pairs = [] if place in self.blind else self.formed
        elif self.inside and not mine:
            return None
        elif mine and self.grown:
            pairs = self.formed
            if not grad:
                self.blind.add(place)
        elif grad:
            pairs = self.formed = []
        else:
            if not self._current(place):
                self._settle()
            pairs = self.still
        return self.deltas[place].complete(pairs[place]) if pairs else None

    def _current(self, place: int) -> bool:
        """Whether what was formed without gradients still holds for one delta."""
        return bool(self.versions) and self.versions[place] == _version(self.deltas[place])

    def _sharded(self) -> bool:
        return any(type(p) is not nn.Parameter for d in self.deltas for p in _numbers(d))

    def _form(self) -> list[Factors]:
        return [] if self._sharded() else self.structure.form(self.deltas)

    def _settle(self) -> None:
        """Form what holds until a number changes."""
        self.still = self._form()
        self.versions = [_version(delta) for delta in self.deltas] if self.still else []


def _recomputing() -> bool:
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


def _traced() -> bool:
    """Whether tensors stand for others: under compilation or a torch.func transform."""
    return torch.compiler.is_compiling() or bool(torch._C._functorch.maybe_current_level())


def _numbers(delta: Delta) -> list[nn.Parameter]:
    """The parameters that the delta's factors are made of, its bank's included."""
    return [*delta.parameters(), *(() if delta.bank is None else delta.bank.parameters())]


def _version(delta: Delta) -> tuple[object, ...]:
    """Changes whenever a number of the delta is written, moved or replaced, and after every step of
    an optimiser, as fused ones write without being counted; inference tensors count no writes, so
    that they never compare equal."""
    numbers = _numbers(delta)
    mode = object() if any(p.is_inference() for p in numbers) else None
    return (
        mode,
        _steps,
        torch.is_inference_mode_enabled(),
        *((id(p), p._version, p.data_ptr(), p.device) for p in numbers if mode is None),
    )
