"""LoRA-GGPO: noise on the weight, row by row as large as the weight's and the gradient's rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from finespun.contract import Delta, Dynamics, Need, StepContext, TrainingHooks, register
from finespun.contract.calculus import push
from finespun.contract.structure import Structure, must_be_one_of, must_be_positive
from finespun.contract.training import Moment, Overlay
from finespun.errors import InputError
from finespun.linalg import LowRank

Form = Literal["paper", "compat"]
SAMPLE = 1000  # rows of W0 whose mean norm the compat form takes


@register
@dataclass(frozen=True, kw_only=True)
class GGPO(Dynamics):
    """y + x Eᵀ, E_ij ~ N(0, v_i), v_i = σ²/in · (‖W_i‖² + β q_i²);  W = W0 + ΔW, q_i = ‖(J g)_i‖.

    Good for: flat minima at high rank, at the price of one more product a layer.
    Not for: layers around whole blocks; very large bases on a slow generator of random numbers.

    E is drawn for each micro-batch and never kept: its backward draws it again. g is the gradient
    of the step before, not clipped; ‖W_i‖ is taken anew every `refresh` steps. form="compat" is
    that of a published tool: √v_i = (σ √(w̄² + ‖(BA)_i‖²) + β q_i²) / √out, w̄ the mean row norm of
    1,000 rows of W0 and BA without its scale. sigma=0 is plain training.
    """

    sigma: float = 0.03
    beta: float = 0.01
    form: Form = "paper"
    refresh: int = 10

    kind = "ggpo"
    source = "arXiv 2502.14538v1"

    def __post_init__(self) -> None:
        must_be_one_of("form", self.form, get_args(Form))
        must_be_positive(refresh=(self.refresh, 10))
        if min(self.sigma, self.beta) < 0:
            raise InputError(
                f"sigma={self.sigma} and beta={self.beta} must not be negative; try 0.03, 0.01"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.OVERLAY})

    def suits(self, structure: Structure) -> None:
        if structure.site_kind == "block":
            raise InputError(
                f"ggpo's noise is that of a layer's weight, and {structure.kind} goes around whole "
                "blocks; try lora or lsr"
            )

    def hooks(self) -> "Noise":
        return Noise(self)


class Noise(TrainingHooks):
    """The noise of one run; row norms of weights and of the last gradient are kept."""

    def __init__(self, form: GGPO) -> None:
        self.form = form
        self.rows: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_step(self, context: StepContext) -> None:
        form = self.form
        if form.sigma == 0:
            return
        for site, delta in context.adapter.deltas.items():
            if site not in self.rows or context.step % form.refresh == 0:
                self.rows[site] = weight_rows(delta, form)
            std = deviations(form, delta, self.rows[site], self.slopes.get(site))
            context.slots.overlay(site, noise(std, delta, context, site))

    @torch.no_grad()
    def gradients_ready(self, context: StepContext) -> None:
        for site, delta in context.adapter.deltas.items():
            own = {n: p.grad for n, p in delta.named_parameters() if p.grad is not None}
            self.slopes[site] = row_norms(push(delta, own))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": dict(self.rows), "slopes": dict(self.slopes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.slopes = dict(state["rows"]), dict(state["slopes"])


def row_norms(M: LowRank | Tensor) -> Tensor:
    """‖M_i‖, (out,), through Gram matrices where M is low rank."""
    if isinstance(M, LowRank):
        return ((M.B @ (M.A @ M.A.mT)) * M.B).sum(1).clamp_min(0).sqrt()
    return torch.linalg.vector_norm(M, dim=1)


def weight_rows(delta: Delta, form: GGPO) -> Tensor:
    """What stands for ‖W_i‖, (out,)."""
    w0 = delta.base_weight()
    pair = delta.factors()
    if form.form == "compat":
        mean = torch.linalg.vector_norm(w0[:SAMPLE], dim=1).mean()
        return torch.hypot(mean, delta.row_norms() / (abs(delta.scale) or 1.0))
    if pair is None:
        return torch.linalg.vector_norm(w0 + delta.dense(w0), dim=1)
    A, B = pair
    cross = 2 * delta.scale * ((w0 @ A.mT.to(w0.dtype)) * B).sum(1)
    own = delta.scale**2 * ((B @ (A @ A.mT)) * B).sum(1)
    return (w0.square().sum(1) + cross + own).clamp_min(0).sqrt()


def deviations(form: GGPO, delta: Delta, rows: Tensor, slopes: Tensor | None) -> Tensor:
    """√v_i, (out,)."""
    q = torch.zeros_like(rows) if slopes is None else slopes.to(rows)
    shape = delta.site.shape
    if form.form == "compat":
        return (form.sigma * rows + form.beta * q.square()) / shape.out_features**0.5
    square = rows.square() + form.beta * q.square()
    return form.sigma * square.sqrt() / shape.in_features**0.5


def noise(std: Tensor, delta: Delta, context: StepContext, site: str) -> Overlay:
    """x ↦ x Eᵀ, E = std ∘ N(0, 1) fixed by (seed, site, step, micro-batch)."""
    shape = delta.site.shape.out_features, delta.site.shape.in_features

    def added(x: Tensor, moment: Moment) -> Tensor:
        def drawn() -> Tensor:
            E = torch.randn(shape, generator=context.generator(site, *moment))
            return std[:, None] * E.to(std)

        made: Tensor = Drawn.apply(x, drawn)  # type: ignore[no-untyped-call]
        return made

    return added


class Drawn(torch.autograd.Function):
    """x Eᵀ, E drawn again by the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drawn: Callable[[], Tensor]) -> Tensor:
        ctx.drawn = drawn
        return x @ drawn().to(x.dtype).mT

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.drawn().to(dy.dtype), None
