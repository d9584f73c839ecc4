"""Before the optimiser exists: hooks see the adapter, and say what is to be trained how."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from finespun.contract import (
    AxisValue,
    Dynamics,
    Measured,
    Need,
    ParamGroup,
    TrainingHooks,
    hooks_of,
)
from finespun.driver.groups import adamw, param_groups
from finespun.errors import InputError
from finespun.hosts import View
from finespun.linalg import LowRank


class Unmeasured:
    """`contract.Measured` where nothing was measured."""

    def gradient(self, site: str) -> Tensor:
        raise InputError(_unmeasured("gradient", site))

    def activation(self, site: str) -> Tensor:
        raise InputError(_unmeasured("activation", site))

    def covariance(self, site: str) -> Tensor:
        raise InputError(_unmeasured("covariance", site))

    def mean(self, site: str) -> Tensor:
        raise InputError(_unmeasured("mean input", site))

    def loss(self) -> float:
        raise InputError(_unmeasured("loss", "the first rows"))

    def update(self, site: str) -> LowRank:
        raise InputError(_unmeasured("update of another adapter", site))

    def weight(self, site: str) -> Tensor:
        raise InputError(_unmeasured("weight before quantisation", site))


class Prepared:
    """The hooks of one run after `prepare`, in their order, with what they need trained.

    `contract.Setup` for them; then `optimizer` or `groups` make what the driver watches.
    """

    def __init__(
        self,
        view: View,
        values: Sequence[AxisValue | TrainingHooks],
        steps: int | None,
        seed: int,
        measured: Measured | None,
        held_out: Iterable[Any],
    ) -> None:
        for value in values:
            if isinstance(value, AxisValue):
                value.suits(view.structure)
        self.adapter = view
        self.hooks = hooks_of(values)
        self.seed = seed
        self.measured: Measured = measured or Unmeasured()
        self.held_out = held_out
        self._steps = steps
        self.stepper = _stepper(values)
        self.made: Optimizer | None = None
        for hooks in self.hooks:
            if Need.HELD_OUT in hooks.needs and not held_out:
                raise InputError(f"{type(hooks).__name__} needs held-out batches: pass held_out=")
            hooks.prepare(self)
        self.wishes: list[ParamGroup] = [g for h in self.hooks for g in h.parameters()]

    @property
    def steps(self) -> int:
        """Optimiser steps of the run. Raises InputError where they are not given."""
        if self._steps is None:
            raise InputError("these hooks need to know how long the run is: pass steps=")
        return self._steps

    @property
    def owned(self) -> list[nn.Parameter]:
        """Parameters of the hooks that are not the adapter's."""
        mine = {id(p) for p in self.adapter.parameters()}
        asked = {id(p): p for wish in self.wishes for p in wish.parameters}
        return [p for key, p in asked.items() if key not in mine]

    def groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for any torch optimiser; see `param_groups`."""
        trained = [p for p in self.adapter.parameters() if p.requires_grad]
        return param_groups(trained, self.wishes, lr, weight_decay)

    def optimizer(self, lr: float, weight_decay: float = 0.0) -> Optimizer:
        """The stepper's optimiser, or AdamW. Parameters that hooks own join it."""
        if self.stepper is None:
            return adamw(self.groups(lr, weight_decay), lr)
        made = self.stepper.optimizer(self.adapter, self.groups(lr, weight_decay), lr)
        if not isinstance(made, Optimizer):
            raise InputError(
                f"{self.stepper.kind} says that it steps itself, but makes a {type(made).__name__}"
                ", no torch Optimizer"
            )
        self.made = made
        return made


def prepare(
    model: nn.Module,
    name: str,
    hooks: Sequence[AxisValue | TrainingHooks] = (),
    steps: int | None = None,
    seed: int = 0,
    measured: Measured | None = None,
    held_out: Iterable[Any] = (),
) -> Prepared:
    """Let values of the axes, or hooks, see adapter `name` of `model` before its optimiser is made.

    Raises StateError where the adapter is not active, InputError where a value does not suit it,
    two of them step, or what they need (steps, held-out batches, measurements) is not given.
    """
    view = View(model, name)
    if steps is not None:
        check(model, name, hooks, steps)
    return Prepared(view, hooks, steps, seed, measured, held_out)


def check(
    model: nn.Module, name: str, values: Sequence[AxisValue | TrainingHooks], steps: int
) -> None:
    """Raise InputError where values of the axes cannot do their work in a run of so many steps:
    what can be refused before training is refused here, and nothing is changed."""
    view = View(model, name)
    _stepper(values)
    for value in values:
        if isinstance(value, AxisValue):
            value.suits(view.structure)
            value.check(view, steps)


def _stepper(values: Sequence[AxisValue | TrainingHooks]) -> Dynamics | None:
    found = [v for v in values if isinstance(v, AxisValue) and Need.STEPPER in v.needs]
    if len(found) > 1:
        names = " and ".join(v.kind for v in found)
        raise InputError(f"{names} are each an optimiser; leave one of them out")
    if found and not isinstance(found[0], Dynamics):
        raise InputError(f"{found[0].kind} is no dynamics: only these can be the optimiser")
    return found[0] if found else None  # type: ignore[return-value]


def _unmeasured(what: str, site: str) -> str:
    return f"the {what} at {site!r} was not measured: declare it in needs, and pass measured="
