"""The axes beside the structure: a value is a frozen dataclass of options that makes hooks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from finespun.contract.method import Method
from finespun.contract.structure import Structure
from finespun.contract.training import AdapterView, TrainingHooks
from finespun.errors import InputError

ORDER = ("initializer", "allocation", "dynamics", "objective")


@dataclass(frozen=True, kw_only=True)
class AxisValue(Method):
    """A value of one axis: what it needs, which structures it suits, its hooks for one run."""

    def suits(self, structure: Structure) -> None:
        """Raise InputError where this is not for such a structure; any will do unless a value says
        otherwise."""

    def check(self, adapter: AdapterView, steps: int) -> None:
        """Raise InputError where a run of so many steps on this adapter cannot do it; asked before
        training, nothing is changed."""

    def hooks(self) -> TrainingHooks:
        """New hooks for one run."""
        raise NotImplementedError(f"{type(self).__name__} must make its hooks")


@dataclass(frozen=True, kw_only=True)
class Initializer(AxisValue):
    """Where an update starts.

    `folder` is what another adapter, or the weights before quantisation, are read from where the
    value needs these (Need.UPDATES, Need.WEIGHTS).
    """

    axis = "initializer"

    @property
    def folder(self) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class Dynamics(AxisValue):
    """How a gradient becomes a step: by hooks on any optimiser, or as an optimiser of its own."""

    axis = "dynamics"

    def optimizer(
        self, adapter: AdapterView, groups: list[dict[str, Any]], lr: float
    ) -> Optimizer | None:
        """The optimiser of all that is trained, where this is one (Need.STEPPER), on groups that
        know who decays and whose lr is f · the run's ("lr_factor": f): those of modules trained
        whole, and parameters of hooks, are among them. State is kept in `optimizer.state`."""
        return None


@dataclass(frozen=True, kw_only=True)
class Objective(AxisValue):
    """What is asked besides the task's loss."""

    axis = "objective"


def hooks_of(values: Iterable[AxisValue | TrainingHooks]) -> list[TrainingHooks]:
    """Hooks in the order in which they are called: initializer, allocation, dynamics, objective,
    then hooks that were given as such. Raises InputError for anything else."""
    given = list(values)
    for value in given:
        if not isinstance(value, AxisValue | TrainingHooks):
            raise InputError(
                f"{value!r} is no value of an axis and no TrainingHooks; try fs.make(...) or an "
                "instance of a subclass of TrainingHooks"
            )
    axes = [v for v in given if isinstance(v, AxisValue)]
    found = []
    for value in sorted(axes, key=lambda v: ORDER.index(v.axis)):
        hooks = value.hooks()
        hooks.needs = hooks.needs | value.needs
        found.append(hooks)
    return found + [v for v in given if isinstance(v, TrainingHooks)]
