"""LoRA+: B learns faster than A."""

from dataclasses import dataclass

from finespun.contract import Dynamics, Need, ParamGroup, Setup, TrainingHooks, register
from finespun.contract.structure import must_be_positive
from finespun.methods.dynamics.pieces.sides import sides


@register
@dataclass(frozen=True, kw_only=True)
class LoRAPlus(Dynamics):
    """lr_B = ratio · lr_A, where ΔW = s B A;  lr_A is the run's.

    Good for: more progress from B, which starts at zero, without a larger step of A.
    Not for: structures without two trained sides.

    B is what B alone reads: LSR's F1, F2 of R(B). Heads, biases and gates keep their lr. Take
    about half of the lr that suits the structure alone.
    """

    ratio: float = 16.0

    kind = "lora_plus"
    title = "LoRA+"
    source = "arXiv 2402.12354"

    def __post_init__(self) -> None:
        must_be_positive(ratio=(self.ratio, 16.0))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.FACTORS})

    def hooks(self) -> "Faster":
        return Faster(self)


class Faster(TrainingHooks):
    """The wish of one run."""

    def __init__(self, form: LoRAPlus) -> None:
        self.form, self.wishes = form, list[ParamGroup]()

    def prepare(self, setup: Setup) -> None:
        self.wishes = [ParamGroup(sides(setup.adapter, "lora_plus")[1], self.form.ratio)]

    def parameters(self) -> list[ParamGroup]:
        return self.wishes
