"""Scaled gradients: each side of a product is measured by the other."""

from dataclasses import dataclass

import torch

from finespun.contract import Dynamics, Need, StepContext, TrainingHooks, register
from finespun.contract.structure import must_be_positive
from finespun.methods.dynamics.pieces.pairs import Pair, Stack, gram, norm, resized, stacked

LEAST = 1e-6


@register
@dataclass(frozen=True, kw_only=True)
class Riemannian(Dynamics):
    """gL ← gL (RRᵀ + δI)⁻¹, gR ← (LᵀL + δI)⁻¹ gR for P = s L R;  δ = damping · trace / k + 1e-6.

    Good for: factors of unequal size; before any optimiser.
    Not for: structures whose parameters form no product.

    LoRA: L = B, R = A. LSR: one level down, F1 and F2 of each side. Every product keeps the norm of
    its raw gradient, so that clipping sees that. AdamW after it is not invariant to (B M, M⁻¹ A).
    """

    damping: float = 1e-2

    kind = "riemannian"
    source = "arXiv 2402.02347"

    def __post_init__(self) -> None:
        must_be_positive(damping=(self.damping, 1e-2))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PRODUCTS})

    def hooks(self) -> "Scaled":
        return Scaled(self)


class Scaled(TrainingHooks):
    """The gradient map of one run."""

    def __init__(self, form: Riemannian) -> None:
        self.form = form

    @torch.no_grad()
    def gradients_ready(self, context: StepContext) -> None:
        for stack in stacked(context.adapter.deltas.values()):
            raw = stack.slope_left, stack.slope_right
            stack.write(resized(scaled(stack, self.form.damping), norm(raw)))


def scaled(stack: Stack, damping: float, least: float = LEAST) -> Pair:
    """The scaled gradients of a stack, at their own size."""
    KL, KR = gram(stack.L.mT, damping, least), gram(stack.R, damping, least)
    return torch.linalg.solve(KR, stack.slope_left.mT).mT, torch.linalg.solve(KL, stack.slope_right)
