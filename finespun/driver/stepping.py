"""Torch's step hooks as they should be: once a step, and not for a step that is skipped."""

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class Nesting:
    """Which calls of a step are steps: torch fires its hooks again for a subclass whose step calls
    its parent's."""

    def __init__(self) -> None:
        self.outer: FrameType | None = None
        self.depth = 0

    def enter(self) -> bool:
        """A hook before a step runs: whether the step is no other's part. A step that was left by
        an error is forgotten: its frame is no longer among those that called this one."""
        caller = sys._getframe(2)
        if self.depth and not _calls(self.outer, caller):
            self.depth = 0
        self.depth += 1
        if self.depth == 1:
            self.outer = caller
        return self.depth == 1

    def leave(self) -> bool:
        """A hook after a step runs: whether the outermost step is done."""
        self.depth -= 1
        if self.depth == 0:
            self.outer = None
        return self.depth == 0

    def reset(self) -> None:
        """The step under way will not be done."""
        self.outer, self.depth = None, 0


def _calls(outer: FrameType | None, frame: FrameType | None) -> bool:
    while frame is not None:
        if frame is outer:
            return True
        frame = frame.f_back
    return False


@torch.no_grad()
def unscale(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Divide the gradients by the scale that GradScaler hands to a fused optimiser, which would
    divide later, and return whether the step will be skipped."""
    own: Any = optimizer
    scale, found = getattr(own, "grad_scale", None), getattr(own, "found_inf", None)
    skipped = found is not None and bool(found)
    if scale is not None and not skipped:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
        own.grad_scale = None
    return skipped
