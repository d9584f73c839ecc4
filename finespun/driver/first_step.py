"""The checks of the first real step: every trained layer ran, and moved."""

import warnings

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finespun.errors import TrainingError
from finespun.hosts import Host, View


class FirstStep:
    """Watches one adapter until its first step with a learning rate that is not 0."""

    def __init__(self, view: View) -> None:
        self.view, self.done = view, False
        self.before: list[Tensor] | None = None
        self.hosts = [d.site for d in view.deltas.values() if isinstance(d.site, Host)]
        for host in self.hosts:
            host.ran = False

    def begins(self, optimizer: Optimizer) -> None:
        """A step is about to be done. Raises TrainingError naming layers that never ran."""
        if self.done or all(group["lr"] == 0 for group in optimizer.param_groups):
            return
        self.check()
        self.before = [p.detach().clone() for p in self._trained()]

    def check(self) -> None:
        """Raise TrainingError naming layers that never ran."""
        idle = [h.name for h in self.hosts if not h.ran]
        if idle and not torch.compiler.is_compiling():
            shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
            raise TrainingError(
                f"{len(idle)} of {len(self.hosts)} layers never ran before the first step: "
                f"{shown}; the model does not call them, leave them out of the targets"
            )

    def ends(self) -> None:
        """The step is done: warn of layers that did not move."""
        if self.before is None:
            return
        after = iter(zip(self.before, self._trained()))
        still = []
        for name, delta in self.view.deltas.items():
            own = [next(after) for p in delta.trained_parameters() if p.requires_grad]
            if own and not delta.silent and not any(bool((a != b).any()) for a, b in own):
                still.append(name)
        bank = list(after)
        if bank and not any(bool((a != b).any()) for a, b in bank):
            still.append("the shared parameters")
        self.before, self.done = None, True
        if still:
            warnings.warn(
                f"{len(still)} layers did not move in the first step: {', '.join(still[:5])}",
                stacklevel=2,
            )

    def _trained(self) -> list[nn.Parameter]:
        own = [p for d in self.view.deltas.values() for p in d.trained_parameters()]
        bank = [] if self.view.bank is None else list(self.view.bank.parameters())
        return [p for p in (*own, *bank) if p.requires_grad]
