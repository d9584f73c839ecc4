"""GLAD: a gradient bent by the gradient at a worse point near by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from finespun.contract import Need, Objective, StepContext, TrainingHooks, register
from finespun.contract.structure import must_be_one_of, must_be_positive
from finespun.errors import InputError, TrainingError

Tensors = list[Tensor]
Rule = Literal["blend", "orth", "bisect", "project"]
CLOSE = 0.98  # cosine of the gradient with that of the replayed step, on the first step


@register
@dataclass(frozen=True, kw_only=True)
class GLAD(Objective):
    """g̃ = steer(g, g_s), g_s = ∇L(θ + ρ g / ‖g‖) on the same batches under the same random state.

    Good for: few-shot tuning that should hold on other classes and domains.
    Not for: loops whose loss is not the model's own; every step costs two.

    blend: (1 − λ) g + λ g_s, λ = 1 is SAM. orth: g + λ p, p what of g_s is orthogonal to g. bisect:
    ‖g‖ in the direction of g / ‖g‖ + λ g_s / ‖g_s‖. project: g, less what of it goes against g_s.
    The norm is over all that is trained; ρ is absolute. With every = k only each k-th step looks
    again and p, at the size of g, serves in between. lam = 0 is plain training but for project.
    """

    rho: float = 0.05
    lam: float = 0.5
    rule: Rule = "blend"
    every: int = 1

    kind = "glad"
    source = "arXiv 2507.13089"

    def __post_init__(self) -> None:
        must_be_one_of("rule", self.rule, get_args(Rule))
        must_be_positive(every=(self.every, 1), rho=(self.rho, 0.05))
        if not 0 <= self.lam <= 1:
            raise InputError(f"lam={self.lam} must be between 0 and 1; try 0.5")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REPLAY})

    def hooks(self) -> "Steered":
        return Steered(self)


class Steered(TrainingHooks):
    """The second passes of one run; with every > 1 the kept p is saved in checkpoints."""

    def __init__(self, form: GLAD) -> None:
        self.form, self.across = form, Tensors()

    def gradients_ready(self, context: StepContext) -> None:
        form = self.form
        if form.lam == 0 and form.rule != "project":
            return
        theta = [p for group in context.optimizer.param_groups for p in group["params"]]
        theta = [p for p in theta if p.grad is not None]
        g = [p.grad.detach() for p in theta if p.grad is not None]
        size = norm(g)
        if size == 0:
            return
        if context.step == 0:
            self._check(g, again(context, theta, lambda: None))
        if context.step % form.every and self.across:
            g_s = [a + b * size for a, b in zip(g, self.across)]
        else:
            before = [p.detach().clone() for p in theta]

            def move() -> None:
                for p, direction in zip(theta, g):
                    p.add_(direction, alpha=form.rho / (size + 1e-12))

            try:
                g_s = again(context, theta, move)
            finally:
                restore(theta, before)
            if form.every > 1:
                self.across = [p / size for p in orthogonal(g_s, g)]
        for p, steered in zip(theta, STEER[form.rule](g, g_s, form.lam)):
            p.grad = steered

    def _check(self, g: Tensors, same: Tensors) -> None:
        cosine = dot(g, same) / max(norm(g) * norm(same), 1e-30)
        ratio = norm(same) / max(norm(g), 1e-30)
        if cosine < CLOSE or not 0.9 < ratio < 1.1:
            raise TrainingError(
                "glad replays a step's batches by the model's own loss, and that does not give the "
                f"step's gradient (cosine {cosine:.3f}, size {ratio:.3f}): this loop's loss is "
                "another, as that of TRL's trainers and of label smoothing is; train by a recipe, "
                "or by a loop that calls backward on the model's loss"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"across": list(self.across)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.across = list(state["across"])


def again(context: StepContext, theta: list[nn.Parameter], move: Callable[[], None]) -> Tensors:
    """The step's gradient once more, after a move of the parameters; p.grad and the random state
    are as before."""
    kept = [p.grad for p in theta]
    with torch.no_grad():
        move()
    try:
        for p in theta:
            p.grad = None
        with torch.enable_grad():
            for batch, share in context.replay():
                loss = getattr(context.call(batch), "loss", None)
                if loss is None:
                    raise TrainingError("glad needs a model that returns its loss: give it labels")
                whole = isinstance(batch, dict) and batch.get("num_items_in_batch") is not None
                (loss if whole else loss * share).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in theta]
    finally:
        for p, gradient in zip(theta, kept):
            p.grad = gradient


@torch.no_grad()
def restore(theta: Sequence[nn.Parameter], before: Tensors) -> None:
    """The parameters are what they were, bit for bit."""
    for p, value in zip(theta, before):
        p.copy_(value)


def dot(a: Tensors, b: Tensors) -> float:
    """⟨a, b⟩ over all tensors."""
    return float(torch.stack([(s.double() * t.double()).sum() for s, t in zip(a, b)]).sum())


def norm(a: Tensors) -> float:
    """‖a‖ over all tensors."""
    return dot(a, a) ** 0.5


def orthogonal(a: Tensors, b: Tensors) -> Tensors:
    """What of a is orthogonal to b."""
    share = dot(a, b) / max(dot(b, b), 1e-30)
    return [s - share * t for s, t in zip(a, b)]


def blend(g: Tensors, s: Tensors, lam: float) -> Tensors:
    """(1 − λ) g + λ g_s."""
    return [(1 - lam) * a + lam * b for a, b in zip(g, s)]


def orth(g: Tensors, s: Tensors, lam: float) -> Tensors:
    """g + λ p."""
    return [a + lam * b for a, b in zip(g, orthogonal(s, g))]


def bisect(g: Tensors, s: Tensors, lam: float) -> Tensors:
    """‖g‖ u / ‖u‖, u = g / ‖g‖ + λ g_s / ‖g_s‖."""
    sizes = norm(g), max(norm(s), 1e-30)
    u = [a / sizes[0] + lam * b / sizes[1] for a, b in zip(g, s)]
    ratio = sizes[0] / max(norm(u), 1e-30)
    return [a * ratio for a in u]


def project(g: Tensors, s: Tensors, lam: float) -> Tensors:
    """g where ⟨g, g_s⟩ ≥ 0, else g without its part along g_s."""
    return g if dot(g, s) >= 0 else orthogonal(g, s)


STEER: dict[str, Callable[[Tensors, Tensors, float], Tensors]] = {
    "blend": blend,
    "orth": orth,
    "bisect": bisect,
    "project": project,
}
