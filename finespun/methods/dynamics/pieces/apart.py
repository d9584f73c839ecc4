"""AdamW for all parameters but those that a stepper moves itself."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

Groups = Mapping[nn.Parameter, dict[str, Any]]


class Apart(torch.optim.AdamW):
    """`move` moves some parameters, AdamW the others; state, schedules, checkpoints are torch's.

    Not fused: a GradScaler then skips whole steps, both parts of them.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, **options: Any) -> None:
        super().__init__(groups, lr=lr, fused=False, **options)

    def move(self, groups: Groups) -> Iterable[nn.Parameter]:
        """Move parameters, each by the options of its group, and say which."""
        raise NotImplementedError(f"{type(self).__name__} must say what it moves")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = list(self.move({p: g for g in self.param_groups for p in g["params"]}))
        gradients = [p.grad for p in moved]
        for parameter in moved:
            parameter.grad = None
        try:
            super().step()
        finally:
            for parameter, gradient in zip(moved, gradients):
                parameter.grad = gradient
        return loss
