"""What does not move in a step: dead parameters stay zero, held ones stay as they are."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finespun.contract import Delta, Group
from finespun.hosts import View


@dataclass
class Held:
    """One parameter that is held in part: where it moves, its values and its state before."""

    moves: Tensor
    values: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


class Stillness:
    """Dead groups (`Delta.switch_off`) and groups held for one step, for one optimiser.

    Before torch's step their gradients become zero; after it dead values and moments are zero, held
    ones what they were. A scalar step count goes on.
    """

    def __init__(self, view: View, optimizer: Optimizer) -> None:
        self.view, self.optimizer = view, optimizer
        self.held: dict[nn.Parameter, Held] = {}

    def hold(self, delta: Delta, group: Group) -> None:
        """Hold a group still until the next step is done."""
        for name, index in group.slices:
            parameter = delta.get_parameter(name)
            if parameter not in self.held:
                self.held[parameter] = Held(torch.ones_like(parameter, dtype=torch.bool))
            self.held[parameter].moves[index] = False

    def dead(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters that are dead in part, each with True where it is alive."""
        return [
            (delta.get_parameter(name), mask)
            for delta in self.view.deltas.values()
            for name, mask in delta.masks().items()
        ]

    @torch.no_grad()
    def before(self) -> None:
        """Zero the gradients, and keep what is held."""
        for parameter, mask in [*self.dead(), *((p, h.moves) for p, h in self.held.items())]:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        for parameter, held in self.held.items():
            held.values = parameter.detach().clone()
            held.state = {key: value.clone() for key, value in self._moments(parameter).items()}

    @torch.no_grad()
    def after(self) -> None:
        """Put back what is held and zero what is dead, in values and moments; let go."""
        for parameter, held in self.held.items():
            if held.values is not None:
                parameter.copy_(torch.where(held.moves, parameter, held.values))
            for key, value in self._moments(parameter).items():
                old = held.state.get(key)
                value.copy_(torch.where(held.moves, value, 0 if old is None else old))
        for parameter, mask in self.dead():
            parameter.mul_(mask)
            for value in self._moments(parameter).values():
                value.mul_(mask)
        self.held.clear()

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.optimizer.state.get(parameter, {})
        return {
            key: value
            for key, value in state.items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }
