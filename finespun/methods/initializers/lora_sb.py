"""LoRA-SB: the core of LoRA-XS starts at the first full step, in its directions (2411.19557)."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from finespun.contract import Initializer, Need, Structure, register
from finespun.contract.structure import must_be_one_of, must_be_positive
from finespun.errors import InputError
from finespun.linalg import randomized_svd_of
from finespun.methods.initializers.pieces.starts import Place, Starting, moved
from finespun.methods.structures.lora_xs import LoRAXS, LoRAXSDelta

HALVINGS = 30


@register
@dataclass(frozen=True, kw_only=True)
class LoRASB(Initializer):
    """B = U_r, A = V_rᵀ, R = diag(S_r) / s of D = −η·sign(∂L/∂W0) = U S Vᵀ.

    Good for: LoRA-XS, whose r² parameters then step as full training would in r directions.
    Not for: other structures; a gradient of few rows: the sign makes noise as large as the rest.

    The model is meant to move: it starts at W0 + s·B R A, with s·B R A the best approximation of
    rank r of the first full step D. `step` is η, the lr of a run divided by its steps of warm-up,
    not its peak. Where the loss of the rows looked at is higher than the base's, R is halved until
    it is not. `basis="gradient"` takes G, at the same size, in place of its sign. For lora_xs with
    start: gradient, without weight decay.
    Source: arXiv 2411.19557.
    """

    step: float = 5e-5
    basis: Literal["sign", "gradient"] = "sign"

    kind = "lora_sb"
    title = "LoRA-SB"
    source = "arXiv 2411.19557"
    needs = frozenset({Need.GRADIENTS, Need.LOSS})

    def __post_init__(self) -> None:
        must_be_one_of("basis", self.basis, ("sign", "gradient"))
        must_be_positive(step=(self.step, 5e-5))

    def suits(self, structure: Structure) -> None:
        if not isinstance(structure, LoRAXS) or structure.start != "gradient":
            raise InputError(
                f"lora_sb sets the frozen sides of lora_xs, not those of {structure.kind}; "
                "try structure: {kind: lora_xs, start: gradient}"
            )

    def first_step(self, G: Tensor) -> Tensor:
        """D (out, in), the first step of full training by AdamW."""
        if self.basis == "sign":
            return -self.step * G.sign()
        return -self.step * G * (G.numel() ** 0.5 / G.norm().clamp_min(1e-30))

    def hooks(self) -> "FirstStep":
        return FirstStep(self)


class FirstStep(Starting):
    """Writes A, B and R, and takes the step back as far as it does harm."""

    def __init__(self, form: LoRASB) -> None:
        super().__init__(form.kind)
        self.form = form

    def start(self, places: list[Place]) -> None:
        if not places:
            return
        looked, cores = places[0].measured, list[Tensor]()
        base = looked.loss()
        for place in places:
            delta = cast(LoRAXSDelta, place.delta)  # `suits` refuses every other
            D, r = self.form.first_step(place.gradient()), place.rank
            U, S, Vh = randomized_svd_of(D, r, oversample=8, power=10, seed=place.seed)
            delta.set_basis(Vh, U)
            delta.R.copy_(torch.diag(S) / place.scale)
            cores.append(delta.R)
        found, halved = looked.loss(), 0
        while not found <= base and halved < HALVINGS:
            for R in cores:
                R.mul_(0.5)
            found, halved = looked.loss(), halved + 1
        taken = f", after {halved} halvings" if halved else ""
        self.told.append(
            f"{moved(self.kind, places)}; the loss of the rows looked at goes from "
            f"{base:.4g} to {found:.4g}{taken}"
        )
