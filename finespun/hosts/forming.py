"""All layers' factors in one product: when they are formed, and how long they stay valid."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finespun.structures import Delta, Structure

Factors = tuple[Tensor, Tensor]


class Former:
    """Forms A and B of all deltas of one adapter by `structure.form`, once per forward pass.

    With gradients they are formed when the root module is entered, and recomputation inside a
    backward pass reuses them; where the root is not entered (a method beside forward, a part called
    on its own) every layer forms its own, as it does under compilation and torch.func transforms.
    Without gradients they stay until a trained number changes.
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
        self.versions: list[tuple[object, ...]] = []
        self.inside = False

    def enter(self) -> None:
        """The root module begins a forward pass."""
        if _traced():
            return
        if torch.is_grad_enabled() or not all(map(self._current, range(len(self.deltas)))):
            self._form()
        self.inside = True

    def leave(self) -> None:
        """The root module has ended a forward pass, normally or by an exception."""
        self.inside = False

    def factors(self, delta: Delta) -> Factors | None:
        """A and B of one delta, gate and exact start applied, or None: form it alone."""
        if _traced():
            return None
        place = self.place.get(id(delta))
        if place is None:
            return None
        if not self.inside and not self._recomputing():
            if torch.is_grad_enabled():
                self.formed, self.versions = [], []
            elif not self._current(place):
                self._form()
        if not self.formed:
            return None
        A, B = self.formed[place]
        lost = (
            torch.is_grad_enabled() and delta.training and not (A.requires_grad or B.requires_grad)
        )
        return None if lost else self.deltas[place].complete((A, B))

    @staticmethod
    def _recomputing() -> bool:
        return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1

    def _current(self, place: int) -> bool:
        """Whether what was formed without gradients still holds for one delta."""
        return bool(self.versions) and self.versions[place] == _version(self.deltas[place])

    def _form(self) -> None:
        sharded = any(type(p) is not nn.Parameter for d in self.deltas for p in _numbers(d))
        self.formed = [] if sharded else self.structure.form(self.deltas)
        keep = not torch.is_grad_enabled() and not sharded
        self.versions = [_version(delta) for delta in self.deltas] if keep else []


def _traced() -> bool:
    """Whether tensors stand for others: under compilation or a torch.func transform."""
    return torch.compiler.is_compiling() or bool(torch._C._functorch.maybe_current_level())


def _numbers(delta: Delta) -> list[nn.Parameter]:
    """The parameters that the delta's factors are made of, its bank's included."""
    return [*delta.parameters(), *(() if delta.bank is None else delta.bank.parameters())]


def _version(delta: Delta) -> tuple[object, ...]:
    """Changes whenever a number of the delta is written, moved or replaced; inference tensors
    count no writes, so that they never compare equal."""
    numbers = _numbers(delta)
    mode = object() if any(p.is_inference() for p in numbers) else None
    return (
        mode,
        torch.is_inference_mode_enabled(),
        *((id(p), p._version, p.data_ptr(), p.device) for p in numbers if mode is None),
    )
