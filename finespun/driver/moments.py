"""Hooks as version 0.1 wrote them, for one version more."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from finespun.contract import AxisValue, StepContext, TrainingHooks


class Moments:
    """What training hooks were in 0.1: subclass `contract.TrainingHooks` instead."""

    def extra_loss(self, batch: Any, outputs: Any) -> Tensor | None:
        """A 0-d term to add to the loss of one forward pass."""
        return None

    def gradients_ready(self, step: int) -> None:
        """All gradients of this step are there, not yet clipped."""

    def after_step(self, step: int) -> None:
        """The optimiser has moved the parameters; `step` counts this step."""

    def news(self, step: int) -> list[str]:
        """What happened after this step, in words, for the log."""
        return []

    def end(self) -> None:
        """Training is over."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values and tensors to resume from."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`."""


class _Renewed(TrainingHooks):
    """Moments of 0.1 behind today's hooks."""

    def __init__(self, old: Moments) -> None:
        self.old = old

    def gradients_ready(self, context: StepContext) -> None:
        self.old.gradients_ready(context.step)

    def after_step(self, context: StepContext) -> None:
        self.old.after_step(context.step + 1)

    def news(self, step: int) -> list[str]:
        return self.old.news(step)

    def end(self, context: StepContext) -> None:
        self.old.end()

    def state_dict(self) -> dict[str, Any]:
        return self.old.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.old.load_state_dict(state)


class _RenewedLoss(_Renewed):
    """Likewise, with an extra loss."""

    def extra_loss(self, context: StepContext, batch: Any, outputs: Any) -> Tensor | None:
        return self.old.extra_loss(batch, outputs)


def renewed(
    hooks: Sequence[AxisValue | TrainingHooks | Moments],
) -> list[AxisValue | TrainingHooks]:
    """The same hooks, those of 0.1 wrapped, with a DeprecationWarning."""
    found: list[AxisValue | TrainingHooks] = []
    for one in hooks:
        if isinstance(one, Moments):
            warnings.warn(
                f"{type(one).__name__} is a driver.Moments of 0.1: subclass "
                "finespun.contract.TrainingHooks, whose hooks are given a context",
                DeprecationWarning,
                stacklevel=4,
            )
            asks = type(one).extra_loss is not Moments.extra_loss
            found.append(_RenewedLoss(one) if asks else _Renewed(one))
        else:
            found.append(one)
    return found
