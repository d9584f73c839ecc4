"""The driver: calls the axes at the moments of a training step, on torch's own optimiser hooks.

prepare → forward and backward (any number) → gradients ready → clip → step → after step → end.
A bare loop, Trainer and TRL are the same to it.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finespun.contract.training import Moments
from finespun.errors import InputError, StateError, TrainingError
from finespun.hosts import Host, adapter_set_of


class Driver:
    """Watches one optimiser that trains adapter `name` of `model`.

    Clips the gradients of all that it trains to `max_grad_norm` (0: not at all), keeps dead numbers
    dead, and checks the first real step: every trained site must have run, or TrainingError names
    those that did not; a site that ran without moving is warned of.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        optimizer: Optimizer,
        max_grad_norm: float = 1.0,
        moments: Sequence[Moments] = (),
    ) -> None:
        if not (math.isfinite(max_grad_norm) and max_grad_norm >= 0):
            raise InputError(f"max_grad_norm={max_grad_norm} must be 0 (off) or positive; try 1.0")
        self.model, self.optimizer, self.moments = model, optimizer, list(moments)
        self.entry = adapter_set_of(model)[name]
        if not self.entry.live:
            raise StateError(f"{name!r} is not active: activate it before training")
        self.max_grad_norm = max_grad_norm
        self.step = 0
        self.grad_norm = 0.0
        self.checked = False
        self._before: list[Tensor] | None = None
        self._hosts = [d.site for d in self.entry.deltas.values() if isinstance(d.site, Host)]
        for host in self._hosts:
            host.ran = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._pre_step),
            optimizer.register_step_post_hook(self._post_step),
        ]
        if any(type(m).extra_loss is not Moments.extra_loss for m in self.moments):
            self._hooks.append(model.register_forward_hook(self._add_loss, with_kwargs=True))

    def parameters(self) -> list[nn.Parameter]:
        """All numbers that the optimiser trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def loss(self, batch: Any, outputs: Any) -> Tensor | float:
        """The sum of all extra losses of one forward pass, for loops with a loss of their own."""
        terms = [t for m in self.moments if (t := m.extra_loss(batch, outputs)) is not None]
        return torch.stack(terms).sum() if terms else 0.0

    def close(self) -> None:
        """Training is over: call every axis's `end` and take the hooks away."""
        for moment in self.moments:
            moment.end()
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Step count and the state of every axis."""
        return {"step": self.step, "moments": [m.state_dict() for m in self.moments]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. Raises InputError when the axes are not those that were saved."""
        if len(state["moments"]) != len(self.moments):
            raise InputError(
                f"the checkpoint holds {len(state['moments'])} axes, this run {len(self.moments)}"
            )
        self.step = state["step"]
        self.checked = self.step > 0
        for moment, saved in zip(self.moments, state["moments"]):
            moment.load_state_dict(saved)

    # --- hooks ----------------------------------------------------------------------------------
    def _add_loss(self, model: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
        if not model.training or getattr(outputs, "loss", None) is None:
            return outputs
        outputs["loss" if isinstance(outputs, dict) else 0] = outputs.loss + self.loss(
            kwargs or args, outputs
        )
        return outputs

    def _pre_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for moment in self.moments:
            moment.gradients_ready(self.step)
        for parameter, mask in self._masked():
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        self._clip()
        if not self.checked and any(group["lr"] != 0 for group in optimizer.param_groups):
            self._check_ran()
            self._before = [p.detach().clone() for p in self._trained()]

    def _post_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        for parameter, mask in self._masked():
            with torch.no_grad():
                parameter.mul_(mask)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.mul_(mask)
        if self._before is not None:
            self._check_moved(self._before)
        for moment in self.moments:
            moment.after_step(self.step)

    def _clip(self) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not gradients:
            return
        total = nn.utils.get_total_norm(gradients)
        self.grad_norm = float(total)
        if self.max_grad_norm and self.grad_norm > self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters(), self.max_grad_norm, total)

    def _masked(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [
            (delta.get_parameter(name), mask)
            for delta in self.entry.deltas.values()
            for name, mask in delta.masks().items()
        ]

    def _trained(self) -> list[nn.Parameter]:
        own = [p for d in self.entry.deltas.values() for p in d.trained_parameters()]
        bank = [] if self.entry.bank is None else list(self.entry.bank.parameters())
        return [p for p in (*own, *bank) if p.requires_grad]

    def _check_ran(self) -> None:
        idle = [h.name for h in self._hosts if not h.ran]
        if idle and not torch.compiler.is_compiling():
            shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
            raise TrainingError(
                f"{len(idle)} of {len(self._hosts)} layers never ran before the first step: "
                f"{shown}; the model does not call them, leave them out of the targets"
            )

    def _check_moved(self, before: list[Tensor]) -> None:
        after = iter(zip(before, self._trained()))
        still = []
        for name, delta in self.entry.deltas.items():
            own = [next(after) for p in delta.trained_parameters() if p.requires_grad]
            if own and not delta.silent and not any(bool((a != b).any()) for a, b in own):
                still.append(name)
        bank = list(after)
        if bank and not any(bool((a != b).any()) for a, b in bank):
            still.append("the shared numbers")
        self._before, self.checked = None, True
        if still:
            warnings.warn(
                f"{len(still)} layers did not move in the first step: {', '.join(still[:5])}",
                stacklevel=2,
            )
