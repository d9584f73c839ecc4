"""What a method may do during training: hooks that a driver calls."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Moments:
    """What a method may do during training; every moment does nothing until overridden.

    Methods on the allocation, dynamics and objective axes subclass it. `state_dict` travels with
    checkpoints.
    """

    def prepare(self, entry: Any, batches: Iterable[Any]) -> None:
        """Before the optimiser exists, with a few batches to look at."""

    def extra_loss(self, batch: Any, outputs: Any) -> Tensor | None:
        """A 0-d term to add to the loss of one forward pass."""
        return None

    def gradients_ready(self, step: int) -> None:
        """All gradients of this step are there, not yet clipped."""

    def after_step(self, step: int) -> None:
        """The optimiser has moved the numbers."""

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
