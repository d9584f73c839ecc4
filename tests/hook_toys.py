"""Small values of each kind of hook: what tests of the driver and of trainers call."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from finespun.contract import AxisValue, Dynamics, Need, ParamGroup, TrainingHooks


class Recorder(TrainingHooks):
    """Writes down every call with step and micro-batch."""

    needs = frozenset({Need.ROOT_LOSS})

    def __init__(self, log=None, name=""):
        self.log, self.name = [] if log is None else log, name

    def write(self, what, context=None):
        at = () if context is None else (context.step, context.micro)
        self.log.append((self.name + what, *at))

    def prepare(self, setup):
        self.write("prepare")

    def begin(self, context):
        self.write("begin", context)

    def before_step(self, context):
        self.write("before_step", context)

    def before_forward(self, context):
        self.write("before_forward", context)

    def extra_loss(self, context, batch, outputs):
        self.write("extra_loss", context)
        return

    def gradients_ready(self, context):
        self.write("gradients_ready", context)

    def after_step(self, context):
        self.write("after_step", context)

    def end(self, context):
        self.write("end", context)


def order(steps, micros, losses=True):
    """What a Recorder writes in a run of so many steps of so many micro-batches."""
    found = [("prepare",), ("begin", 0, 0)]
    for step in range(steps):
        found.append(("before_step", step, 0))
        for micro in range(micros):
            found.append(("before_forward", step, micro))
            if losses:
                found.append(("extra_loss", step, micro))
        found += [("gradients_ready", step, micros - 1), ("after_step", step, micros - 1)]
    return [*found, ("end", steps, 0)]


class Gain(TrainingHooks):
    """ALLoRA's: gain_i = (‖ΔW_i‖ + 1/η²)^(-1/2), derived anew in every step."""

    needs = frozenset({Need.GAIN, Need.FACTORS})

    @torch.no_grad()
    def before_step(self, context):
        for name, delta in context.adapter.deltas.items():
            A, B = delta.factors()
            norm = ((B @ (A @ A.T)) * B).sum(1).clamp_min(0).sqrt() * delta.scale
            context.slots.gain(name, torch.rsqrt(norm + 0.5))


class Noise(TrainingHooks):
    """An overlay: x Eᵀ with E drawn for each (step, micro-batch)."""

    needs = frozenset({Need.OVERLAY})

    def __init__(self, size=0.1):
        self.size, self.seen = size, []

    def begin(self, context):
        for name, delta in context.adapter.deltas.items():
            context.slots.overlay(name, self.overlay(context, name, delta.site.shape))

    def overlay(self, context, name, shape):
        def added(x, moment):
            self.seen.append(tuple(moment))
            g = context.generator(name, *moment)
            E = torch.randn(shape.out_features, shape.in_features, generator=g).to(x)
            return F.linear(x, self.size * E)

        return added


class Gates(TrainingHooks):
    """SoRA's: a proximal step on trained gates after every step, ξ = λ·lr."""

    needs = frozenset({Need.GATES})

    def __init__(self, strength=1.0, lr_factor=1.0):
        self.strength, self.lr_factor, self.gates = strength, lr_factor, []

    def prepare(self, setup):
        for delta in setup.adapter.deltas.values():
            gate = nn.Parameter(torch.ones(len(delta.low_rank()[0]), device=delta.site.device))
            delta._buffers.pop("gate", None)
            delta.register_buffer("gate", gate)
            delta._buffers["gate"] = gate
            self.gates.append(gate)

    def parameters(self):
        return [ParamGroup(self.gates, self.lr_factor, decay=False)]

    def begin(self, context):
        self.deltas = list(context.adapter.deltas.values())

    def load_state_dict(self, state):
        for delta, gate in zip(self.deltas, self.gates):
            delta._buffers["gate"] = gate

    @torch.no_grad()
    def after_step(self, context):
        for gate in self.gates:
            gate.copy_(F.softshrink(gate, self.strength * context.lr(gate)))


class Drift(TrainingHooks):
    """A state that nothing else knows: the sum of the gradient norms, kept in checkpoints."""

    def __init__(self):
        self.total = 0.0

    def gradients_ready(self, context):
        grads = [p.grad.norm() for p in context.adapter.parameters() if p.grad is not None]
        self.total += float(torch.stack(grads).norm())

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


class Shift(TrainingHooks):
    """θ + ρ m/‖m‖ during the passes of a step (MGPO's), m the optimiser's momentum."""

    needs = frozenset({Need.PERTURBATION})

    def __init__(self, rho=0.1):
        self.rho = rho

    def before_step(self, context):
        moments = {
            p: context.optimizer.state[p]["exp_avg"]
            for p in context.adapter.parameters()
            if "exp_avg" in context.optimizer.state.get(p, {})
        }
        if moments:
            norm = math.sqrt(sum(float(m.square().sum()) for m in moments.values()))
            context.slots.perturb({p: m * (self.rho / norm) for p, m in moments.items()})


class Alternate(TrainingHooks):
    """Holds one group still at each site, another in every step."""

    needs = frozenset({Need.HOLD})

    def __init__(self, kind="rank"):
        self.kind, self.held = kind, []

    def before_step(self, context):
        self.held = []
        for name, delta in context.adapter.deltas.items():
            groups = delta.groups(self.kind)
            group = groups[context.step % len(groups)]
            context.slots.hold_still(name, group)
            self.held.append((delta, group))


class Owner(TrainingHooks):
    """Owns a parameter θ, trained by its extra loss ½(θ - 3)²."""

    needs = frozenset({Need.ROOT_LOSS})

    def __init__(self):
        self.theta = nn.Parameter(torch.zeros(()))

    def parameters(self):
        return [ParamGroup([self.theta], lr_factor=2.0)]

    def extra_loss(self, context, batch, outputs):
        return 0.5 * (self.theta - 3).square()


class Pull(TrainingHooks):
    """An extra loss: λ·Σ θ over the adapter's parameters; its gradient is λ everywhere."""

    needs = frozenset({Need.ROOT_LOSS})

    def __init__(self, weight=1e3):
        self.weight, self.seen = weight, []

    def extra_loss(self, context, batch, outputs):
        return self.weight * context.adapter.parameters()[0].sum()

    def gradients_ready(self, context):
        grad = context.adapter.parameters()[0].grad
        self.seen.append(float(grad.mean()) / self.weight)


class SignDescent(torch.optim.Optimizer):
    """θ ← θ − lr·sign(g), with a momentum-free state: the count of its steps."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())
                    self.state[p]["steps"] = self.state[p].get("steps", 0) + 1


@dataclass(frozen=True, kw_only=True)
class Stepper(Dynamics):
    """SignDescent as dynamics, matrices B with another learning rate (LoRA+)."""

    factor: float = 4.0

    kind = "toy_stepper"
    needs = frozenset({Need.STEPPER})

    def hooks(self):
        return TrainingHooks()

    def optimizer(self, adapter, groups, lr):
        up = {id(p) for d in adapter.deltas.values() for n, p in d.named_parameters() if n == "B"}
        made = []
        for group in groups:
            for fast in (False, True):
                mine = [p for p in group["params"] if (id(p) in up) == fast]
                factor = group.get("lr_factor", 1.0) * (self.factor if fast else 1.0)
                if mine:
                    made.append({"params": mine, "lr": lr * factor, "lr_factor": factor})
        return SignDescent(made, lr)


def value_of(axis, name, log):
    """A value of an axis whose hooks write into one log."""
    base = type("Base", (AxisValue,), {"axis": axis})
    cls = dataclass(frozen=True, kw_only=True)(
        type(name, (base,), {"kind": name, "hooks": lambda self: Recorder(log, f"{name} ")})
    )
    return cls()
