"""A value on each axis, from outside the package: one class each, and nothing else names them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finespun.contract import (
    Allocation,
    Bank,
    Delta,
    Dynamics,
    Initializer,
    Need,
    Objective,
    Plan,
    Site,
    SiteShape,
    Structure,
    TrainingHooks,
    register,
)

CALLS: list[str] = []


@register
@dataclass(frozen=True, kw_only=True)
class ToyScale(Structure):
    """ΔW = v·1ᵀ / in, one number for each output."""

    size: float = 1.0

    kind = "toy_structure"
    source = "tests"

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "ToyDelta":
        return ToyDelta(site)

    def num_parameters(self, shape: SiteShape, choice: object = None) -> int:
        return shape.out_features

    def flops(self, shape: SiteShape, *about: object) -> int:
        return shape.out_features * shape.in_features


class ToyDelta(Delta):
    """v (out,)."""

    reads_base = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.v = nn.Parameter(torch.zeros(site.shape.out_features, device=site.device))

    def delta(self, w0: Tensor) -> Tensor:
        return (self.v / w0.shape[1])[:, None].expand_as(w0)


class Noted(TrainingHooks):
    """Notes which hooks are called for which value."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def prepare(self, setup) -> None:
        CALLS.append(f"{self.kind} prepare")
        if Need.GRADIENTS in self.needs:
            for site, delta in setup.adapter.deltas.items():
                shape = delta.site.shape
                gradient = setup.measured.gradient(site)
                assert gradient.shape == (shape.out_features, shape.in_features)

    def after_step(self, context) -> None:
        CALLS.append(f"{self.kind} after_step")


@register
@dataclass(frozen=True, kw_only=True)
class ToyStart(Initializer):
    """Looks at the gradients of the base."""

    depth: int = 1

    kind = "toy_initializer"
    needs = frozenset({Need.GRADIENTS})

    def hooks(self) -> TrainingHooks:
        return Noted(self.kind)


@register
@dataclass(frozen=True, kw_only=True)
class ToyShare(Allocation):
    """Gives every layer the same."""

    share: float = 0.5

    kind = "toy_allocation"

    def hooks(self) -> TrainingHooks:
        return Noted(self.kind)


@register
@dataclass(frozen=True, kw_only=True)
class ToyStep(Dynamics):
    """Steps as torch does; with `factors` it asks for factors."""

    factors: bool = False

    kind = "toy_dynamics"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.FACTORS} if self.factors else ())

    def hooks(self) -> TrainingHooks:
        return Noted(self.kind)


@register
@dataclass(frozen=True, kw_only=True)
class ToyWish(Objective):
    """Asks for nothing."""

    weight: float = 1.0

    kind = "toy_objective"

    def hooks(self) -> TrainingHooks:
        return Noted(self.kind)
