"""Other parameters between forward and step, taken back bit for bit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finespun.errors import InputError


class Perturbation:
    """Changes added to parameters for the passes of one step, and what stood there before.

    An evaluation in between sees the parameters themselves: `aside` puts them back and `resume`
    brings the changed ones again, both bit for bit.
    """

    def __init__(self) -> None:
        self.originals: dict[nn.Parameter, Tensor] = {}
        self.changed: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def add(self, changes: Mapping[nn.Parameter, Tensor]) -> None:
        """Add to parameters. Raises InputError for another shape; nothing is changed then."""
        for parameter, change in changes.items():
            if change.shape != parameter.shape:
                raise InputError(
                    f"a perturbation of {tuple(change.shape)} does not fit a parameter of "
                    f"{tuple(parameter.shape)}"
                )
        self.resume()
        for parameter, change in changes.items():
            self.originals.setdefault(parameter, parameter.detach().clone())
            parameter.add_(change)

    @torch.no_grad()
    def aside(self) -> None:
        """The parameters are what they were; the changes wait."""
        if self.changed:
            return
        for parameter, original in self.originals.items():
            self.changed[parameter] = parameter.detach().clone()
            parameter.copy_(original)

    @torch.no_grad()
    def resume(self) -> None:
        """The changes are there again."""
        for parameter, changed in self.changed.items():
            parameter.copy_(changed)
        self.changed.clear()

    @torch.no_grad()
    def undo(self) -> None:
        """The parameters are what they were, and nothing waits."""
        if not self.changed:
            for parameter, original in self.originals.items():
                parameter.copy_(original)
        self.originals.clear()
        self.changed.clear()
