"""LoRA-MGPO: the gradient is taken a step further along the optimiser's momentum."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finespun.contract import Delta, Dynamics, Need, StepContext, TrainingHooks, register
from finespun.contract.calculus import parameters_of, push
from finespun.contract.structure import must_be_one_of
from finespun.contract.training import Moment, Overlay
from finespun.errors import InputError
from finespun.linalg import LowRank

Space = Literal["factors", "weights"]
MOST = 10.0  # of 1/ḡ


@register
@dataclass(frozen=True, kw_only=True)
class MGPO(Dynamics):
    """g at θ + ε, ε = ± ρ m / (‖m‖ ḡ);  m the optimiser's momentum, ḡ ← β ḡ + (1 − β) ‖g‖.

    Good for: flatter minima at the price of no second pass.
    Not for: optimisers without momentum.

    space="factors": θ are all parameters that are trained, the norm is global, and they are put
    back bit for bit before the step. space="weights": each ΔW moves along J m, of norm ρ / ḡ; base
    and parameters stay. sign=+1 is the paper's, -1 that of its code. 1/ḡ is at most 10, ḡ starts at
    the first norm, the first step is plain; `beta`=0.9.
    """

    rho: float = 0.05
    beta: float = 0.9
    sign: int = 1
    space: Space = "factors"

    kind = "mgpo"
    source = "arXiv 2502.14538v2"

    def __post_init__(self) -> None:
        must_be_one_of("space", self.space, get_args(Space))
        must_be_one_of("sign", self.sign, (1, -1))
        if not (self.rho >= 0 and 0 <= self.beta < 1):
            raise InputError(
                f"rho={self.rho} must be 0 or positive, beta={self.beta} in [0, 1); try 0.05, 0.9"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PERTURBATION if self.space == "factors" else Need.OVERLAY})

    def hooks(self) -> "Ahead":
        return Ahead(self)


class Ahead(TrainingHooks):
    """The perturbations of one run; ḡ is kept in checkpoints."""

    def __init__(self, form: MGPO) -> None:
        self.form, self.size = form, 0.0

    def begin(self, context: StepContext) -> None:
        options = context.optimizer.defaults
        if not ("betas" in options or options.get("momentum", 0) > 0):
            raise InputError(
                f"mgpo follows the momentum, and {type(context.optimizer).__name__} keeps none; "
                "try AdamW, or SGD with momentum=0.9"
            )

    @torch.no_grad()
    def before_step(self, context: StepContext) -> None:
        m = momenta(context.optimizer)
        length = self.form.sign * self.form.rho * min(1 / self.size, MOST) if self.size else 0.0
        if not length or not m:
            return
        if self.form.space == "weights":
            for site, delta in context.adapter.deltas.items():
                context.slots.overlay(site, moved(delta, m, length))
            return
        whole = torch.stack([t.norm() for t in m.values()]).norm().clamp_min(1e-30)
        context.slots.perturb({p: t * (length / whole) for p, t in m.items()})

    @torch.no_grad()
    def gradients_ready(self, context: StepContext) -> None:
        own = [p.grad for g in context.optimizer.param_groups for p in g["params"]]
        norm = float(torch.stack([g.norm() for g in own if g is not None]).norm())
        beta = self.form.beta
        self.size = beta * self.size + (1 - beta) * norm if self.size else norm

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = state["size"]


def momenta(optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
    """First moments of what is trained."""
    trained: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
    found = {}
    for parameter in trained:
        state = optimizer.state.get(parameter, {})
        m = state.get("exp_avg", state.get("momentum_buffer"))
        if m is not None:
            found[parameter] = m
    return found


def moved(delta: Delta, m: dict[nn.Parameter, Tensor], length: float) -> Overlay:
    """x ↦ x Dᵀ, D along J m and of norm `length`; of rank 2r where there are factors."""
    bank = {} if delta.bank is None else {f"bank.{n}": p for n, p in delta.bank.named_parameters()}
    named = {n: p for n, p in (*delta.named_parameters(), *bank.items()) if p in m}
    theta = parameters_of(delta)
    D = push(delta, {n: m[p].to(p.dtype) for n, p in named.items() if n in theta})
    size = float(D.norm()) if isinstance(D, LowRank) else float(torch.linalg.matrix_norm(D))
    factor = length / max(size, 1e-30)

    def added(x: Tensor, moment: Moment) -> Tensor:
        if isinstance(D, LowRank):
            return (x.to(D.A.dtype) @ D.A.mT) @ D.B.mT * factor
        return x.to(D.dtype) @ D.mT * factor

    return added
