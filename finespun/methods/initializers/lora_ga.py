"""LoRA-GA: the first step of the update follows the full gradient (arXiv 2407.05000)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finespun.contract import Need, register
from finespun.contract.delta import Factors
from finespun.contract.structure import must_be_one_of, must_be_positive
from finespun.linalg import randomized_svd_of
from finespun.methods.initializers.pieces.alignment import align
from finespun.methods.initializers.pieces.starts import TOLD, FactorStart, Place, large

SPLITS = ("ArB2r", "A2rBr", "ArBr", "random")
POOR = 0.3
SCALES = ("stable", "unit", "gd", "weight")


@register
@dataclass(frozen=True, kw_only=True)
class LoRAGA(FactorStart):
    """A0 = k V[:, I_A]ᵀ, B0 = k U[:, I_B] of G = ∂L/∂W0 = U S Vᵀ, I_A and I_B disjoint in 1..2r.

    Good for: few steps: the first one moves W in nearly the direction of full training.
    Not for: large lr: such a start is large beside its weight.

    One step moves W by −t·s²(G AᵀA + B Bᵀ G), nearest to G for every such split of the first 2r
    components. `direction`: "ArB2r" (A takes 1..r, B r+1..2r), "A2rBr" the reverse, "ArBr" (A even,
    B odd ones) or "random". `scale_by`: "stable" k = out^¼ / √gamma; "unit" k = 1; "gd" k = 1/s;
    "weight" k = the mean of √(S_i(W0) / s), i ≤ r. Singular values of G are not used: the size of
    the loss does not matter. ΔW = s (B A − B0 A0): the base is not edited. A form that cannot hold
    A0 and B0, as LSR's, is brought nearer by `refine` steps on the cosine of its first step with G.
    Source: arXiv 2407.05000, where s is alpha / √r (`rslora`).
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale_by: Literal["stable", "unit", "gd", "weight"] = "stable"
    gamma: float = 16.0

    kind = "lora_ga"
    title = "LoRA-GA"
    source = "arXiv 2407.05000"
    needs = frozenset({Need.GRADIENTS})
    apart = True

    def __post_init__(self) -> None:
        super().__post_init__()
        must_be_one_of("direction", self.direction, SPLITS)
        must_be_one_of("scale_by", self.scale_by, SCALES)
        must_be_positive(gamma=(self.gamma, 16.0))

    def factors(self, place: Place) -> Factors | None:
        G, r = place.gradient(), place.rank
        if not bool(G.any()):
            return None
        width = min(2 * r, *G.shape)
        U, _, Vh = randomized_svd_of(G, width, oversample=width, power=4, seed=place.seed)
        a, b = self.split(place, r, width)
        k = self.size(place)
        place.seen = G
        return k * Vh[a], k * U[:, b]

    def split(self, place: Place, r: int, width: int) -> tuple[Tensor, Tensor]:
        """The components of A and of B; they overlap where there are fewer than 2r."""
        every = torch.arange(width)
        if self.direction == "random":
            every = torch.randperm(width, generator=place.generator("split"))
        if self.direction == "ArBr" and width == 2 * r:
            return every[1::2], every[0::2]
        first, last = every[:r], every[-r:]
        return (last, first) if self.direction == "A2rBr" else (first, last)

    def size(self, place: Place) -> float:
        """k, the length of every row of A0 and column of B0."""
        if self.scale_by == "unit":
            return 1.0
        if self.scale_by == "gd":
            return 1 / place.scale
        if self.scale_by == "weight":
            S = randomized_svd_of(place.weight(), place.rank, power=4, seed=place.seed).S
            return float((S / place.scale).sqrt().mean())
        return float(place.delta.site.shape.out_features**0.25 / self.gamma**0.5)

    def settle(self, place: Place, pair: Factors, error: float) -> list[str]:
        told, factored = large(place, pair, most=0.5), place.delta.low_rank() is not None
        if error > TOLD and factored and place.seen is not None:
            found = align(place.delta, place.seen, self.refine)
            if found < POOR:
                told.append(
                    f"{place.name!r}: cosine of first step and gradient is {found:.2g} only"
                )
        return told
