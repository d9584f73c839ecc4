"""Groups of parameters that live or die together: a rank, a Kronecker term, a module, a head."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Group:
    """Slices of one delta's parameters that are kept or removed as one.

    `slices` lists (parameter name, index); `stays_in_form` says whether removal leaves the method's
    own form (a LoRA rank, an LSR term) or only its exported factors.
    """

    kind: str
    label: str
    slices: tuple[tuple[str, Index], ...]
    stays_in_form: bool = True

    def parts(self, delta: nn.Module) -> list[Tensor]:
        """Views of the group's parameters."""
        return [delta.get_parameter(name)[index] for name, index in self.slices]

    def norm(self, delta: nn.Module) -> Tensor:
        """Euclidean norm over all parameters of the group, a 0-d tensor."""
        return torch.stack([p.detach().square().sum() for p in self.parts(delta)]).sum().sqrt()

    def shrink(self, delta: nn.Module, threshold: float) -> float:
        """The proximal step of threshold·‖g‖: g ← max(0, 1 − threshold/‖g‖) g. Returns the norm
        that is left; at 0.0 the group can be switched off."""
        norm = float(self.norm(delta))
        factor = max(0.0, 1.0 - threshold / norm) if norm > 0 else 0.0
        with torch.no_grad():
            for part in self.parts(delta):
                part.mul_(factor)
        return factor * norm
