"""LoRA-Pro: the step of the factors whose effect on the weight is nearest to the full gradient."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer

from finespun.contract import (
    AdapterView,
    Delta,
    Dynamics,
    Need,
    StepContext,
    TrainingHooks,
    register,
)
from finespun.contract.structure import must_be_one_of, must_be_positive
from finespun.errors import InputError
from finespun.methods.dynamics.pieces.adam_in_product import ProductAdamW
from finespun.methods.dynamics.pieces.normal import dot, parameters_of, solved, systems
from finespun.methods.dynamics.pieces.pairs import (
    TINY,
    effect_norm,
    nearest,
    norm,
    resized,
    stacked,
)

Mode = Literal["light", "sgd", "full", "factored"]


@register
@dataclass(frozen=True, kw_only=True)
class LoRAPro(Dynamics):
    """(hA, hB) = argmin ‖s (B hA + hB A) − G‖, the smallest such pair, from gA and gB alone.

    Good for: following full fine-tuning's gradient, at the cost of r x r solves a layer.
    Not for: "full" on large layers: its two moments are as large as the weight.

    light: the pair goes to the run's optimiser, at the norm of the raw gradient of its site; other
    forms than LoRA's by `iterations` of conjugate gradients. The rest are optimisers: sgd steps by
    the pair itself; full keeps Adam's moments of the product's change g̃ and pulls the wanted step
    back; factored the same with the first moment in bfloat16 and the second by rows and columns.
    These three need products (LSR: one level down), and the clip is of the mapped gradient, of g̃
    for full and factored. Grams are damped by damping · trace / r. Until step `warmup` light leaves
    gradients as they are: right after B = 0 the pair is as good as unbounded.
    """

    mode: Mode = "light"
    damping: float = 1e-4
    iterations: int = 5
    warmup: int = 0

    kind = "lora_pro"
    title = "LoRA-Pro"
    source = "arXiv 2407.18242"

    def __post_init__(self) -> None:
        must_be_one_of("mode", self.mode, get_args(Mode))
        must_be_positive(damping=(self.damping, 1e-4))
        if self.iterations < 1 or self.warmup < 0:
            raise InputError(
                f"iterations={self.iterations} and warmup={self.warmup} must be at least 1 and 0; "
                "try 5 and 0"
            )

    @property
    def needs(self) -> frozenset[Need]:
        own = {Need.STEPPER, Need.PRODUCTS} if self.mode != "light" else set[Need]()
        return frozenset(own)

    def hooks(self) -> TrainingHooks:
        return Light(self) if self.mode == "light" else Mapped(self)

    def optimizer(
        self, adapter: AdapterView, groups: list[dict[str, Any]], lr: float
    ) -> Optimizer | None:
        if self.mode == "sgd":
            return torch.optim.SGD(groups, lr=lr)
        if self.mode == "light":
            return None
        deltas = list(adapter.deltas.values())
        return ProductAdamW(groups, lr, deltas, self.damping, self.mode == "factored")


class Mapped(TrainingHooks):
    """Gradients of products become the nearest pair: of its own size for SGD, of g̃'s for Adam."""

    def __init__(self, form: LoRAPro) -> None:
        self.form = form

    @torch.no_grad()
    def gradients_ready(self, context: StepContext) -> None:
        for stack in stacked(context.adapter.deltas.values()):
            pair = nearest(stack, damping=self.form.damping)
            own = self.form.mode == "sgd"
            stack.write(pair if own else resized(pair, effect_norm(stack, pair)))


class Light(TrainingHooks):
    """The same for any structure and optimiser, at the size of the raw gradients."""

    def __init__(self, form: LoRAPro) -> None:
        self.form = form

    def gradients_ready(self, context: StepContext) -> None:
        if context.step < self.form.warmup:
            return
        adapter = context.adapter
        closed = [d for d in adapter.deltas.values() if is_product(d)]
        with torch.no_grad():
            for stack in stacked(closed):
                pair = nearest(stack, damping=self.form.damping)
                stack.write(resized(pair, norm((stack.slope_left, stack.slope_right))))
        done = {id(d) for d in closed}
        self._solve([d for d in adapter.deltas.values() if id(d) not in done])

    def _solve(self, deltas: list[Delta]) -> None:
        for system in systems(deltas):
            g = [p.grad.detach() for p in system.theta if p.grad is not None]
            h = solved(system.apply, g, self.form.iterations)
            ratio = (dot(g, g) / max(dot(h, h), TINY)) ** 0.5
            for parameter, change in zip(system.theta, h):
                parameter.grad = change.mul_(ratio)


def is_product(delta: Delta) -> bool:
    """Whether ΔW is one product of all that is trained in it."""
    found, shape = delta.products(), delta.site.shape
    if len(found) != 1 or "low_rank" not in delta.written:
        return False  # without factors of its own ΔW is made of the product, and not the same
    whole = found[0].L.shape[0], found[0].R.shape[1]
    ids = {id(p) for p in found[0].sides()}
    return whole == (shape.out_features, shape.in_features) and ids == {
        id(p) for p in parameters_of(delta)
    }
