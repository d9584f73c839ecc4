"""ALLoRA: a gradient that is large while a row of the update is small."""

from dataclasses import dataclass

import torch

from finespun.contract import Dynamics, Need, StepContext, TrainingHooks, register
from finespun.contract.structure import must_be_positive


@register
@dataclass(frozen=True, kw_only=True)
class ALLoRA(Dynamics):
    """What reaches the parameters from row i is multiplied by c_i = 1 / √(‖ΔW_i‖ + 1/η²).

    Good for: leaving a zero start fast; short runs without dropout and scale.
    Not for: AdamW, which divides slow factors out; the effect is large under SGD.

    c_i is η at a zero row. Outputs and the gradient of the layer below stay. The norm is ΔW's, its
    scale included; take alpha = rank for the paper's rule. Clipping by the global norm undoes a
    factor that is the same everywhere.
    """

    eta: float = 2**0.5

    kind = "allora"
    source = "arXiv 2410.09692"

    def __post_init__(self) -> None:
        must_be_positive(eta=(self.eta, 2**0.5))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.GAIN})

    def hooks(self) -> "Gains":
        return Gains(self)


class Gains(TrainingHooks):
    """The gains of one run, derived from the parameters before every step."""

    def __init__(self, form: ALLoRA) -> None:
        self.form = form

    @torch.no_grad()
    def before_step(self, context: StepContext) -> None:
        for site, delta in context.adapter.deltas.items():
            context.slots.gain(site, torch.rsqrt(delta.row_norms() + self.form.eta**-2))
