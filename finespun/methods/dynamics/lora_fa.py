"""LoRA-FA: A stays as it was drawn, and B steps as the full gradient would on A's rows."""

from dataclasses import dataclass

import torch

from finespun.contract import (
    Dynamics,
    Need,
    ParamGroup,
    Setup,
    StepContext,
    TrainingHooks,
    register,
)
from finespun.errors import InputError
from finespun.methods.dynamics.pieces.normal import dot, solved, systems
from finespun.methods.dynamics.pieces.sides import sides

ITERATIONS = 10


@register
@dataclass(frozen=True, kw_only=True)
class LoRAFA(Dynamics):
    """A frozen; gB ← gB (A Aᵀ)⁻¹ / s², the h of min ‖s h A − G‖: s h A = G P_A.

    Good for: half the optimiser state, and no gradient of A.
    Not for: structures without two trained sides; a start that leaves B alone to be zero for good.

    What B alone reads is trained; LSR's two factors of it by conjugate gradients, which for LoRA
    end at the inverse within r iterations. The norm of the raw gradient is kept at each site. With
    scaled=False gradients stay as they are (the first version of the paper).
    """

    scaled: bool = True

    kind = "lora_fa"
    title = "LoRA-FA"
    source = "arXiv 2308.03303"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.FACTORS})

    def hooks(self) -> "Frozen":
        return Frozen(self)


class Frozen(TrainingHooks):
    """One run: A's wish to be frozen, and the map of B's gradients."""

    def __init__(self, form: LoRAFA) -> None:
        self.form, self.wishes = form, list[ParamGroup]()

    def prepare(self, setup: Setup) -> None:
        down, _ = sides(setup.adapter, "lora_fa")
        for name, delta in setup.adapter.deltas.items():
            pair = delta.low_rank()
            if pair is not None and not bool(pair[0].any()):
                raise InputError(
                    f"lora_fa freezes A, which is zero at {name!r}: nothing would move"
                )
        self.wishes = [ParamGroup(down, 0.0)]

    def parameters(self) -> list[ParamGroup]:
        return self.wishes

    def gradients_ready(self, context: StepContext) -> None:
        if not self.form.scaled:
            return
        for system in systems(context.adapter.deltas.values()):
            g = [p.grad.detach() for p in system.theta if p.grad is not None]
            h = solved(system.apply, g, ITERATIONS)
            ratio = (dot(g, g) / max(dot(h, h), torch.finfo(torch.float64).tiny)) ** 0.5
            for parameter, change in zip(system.theta, h):
                parameter.grad = change.mul_(ratio)
