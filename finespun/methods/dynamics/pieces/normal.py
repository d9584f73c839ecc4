"""h = argmin ‖J h − G‖ for any structure, from g = Jᵀ G alone: conjugate gradients on JᵀJ.

J v comes from one graph of the factors, by differentiating w ↦ Jᵀ w, which is linear in w, once
more; where there are factors (Jᵀ J) v stays at their size: ΔW = s B A gives

    A: s² (BᵀB dA + Bᵀ dB A),   B: s² (B dA Aᵀ + dB A Aᵀ).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finespun.contract import Delta

Tensors = list[Tensor]
Operator = Callable[[Tensors], Tensors]


@dataclass
class System:
    """Parameters that are solved for together, and v ↦ JᵀJ v, summed over the sites they serve."""

    theta: list[nn.Parameter]
    apply: Operator


def parameters_of(delta: Delta) -> list[nn.Parameter]:
    """What ΔW is trained by and has a gradient, the bank's included; gates are not."""
    bank = [] if delta.bank is None else list(delta.bank.parameters())
    own = [*delta.trained_parameters(), *bank]
    return [p for p in own if p.requires_grad and p.grad is not None]


def systems(deltas: Iterable[Delta]) -> Iterator[System]:
    """One system a delta, or one for all deltas of a bank; without parameters that ΔW does not
    read, as those of a bias."""
    together: dict[int, list[Delta]] = {}
    for delta in deltas:
        together.setdefault(id(delta if delta.bank is None else delta.bank), []).append(delta)
    for group in together.values():
        theta = list({id(p): p for d in group for p in parameters_of(d)}.values())
        made = [_normal(delta, theta) for delta in group] if theta else []
        at = [i for i in range(len(theta)) if any(read[i] for read, _ in made)]
        if at:
            yield System([theta[i] for i in at], _summed([op for _, op in made], theta, at))


def _summed(operators: list[Operator], theta: Sequence[Tensor], at: list[int]) -> Operator:
    def apply(v: Tensors) -> Tensors:
        whole = [torch.zeros_like(t) for t in theta]
        for i, change in zip(at, v):
            whole[i] = change
        parts = [operator(whole) for operator in operators]
        return [sum(part[i] for part in parts) for i in at]  # type: ignore[misc]

    return apply


@torch.enable_grad()
def _normal(delta: Delta, theta: Sequence[nn.Parameter]) -> tuple[list[bool], Operator]:
    """Which parameters ΔW reads, and v ↦ JᵀJ v of one site."""
    pair = delta.factors()
    outputs = pair if pair is not None else (delta.dense(delta.base_weight()),)
    moving = [o for o in outputs if o.requires_grad]
    if not moving:
        return [False] * len(theta), lambda v: [torch.zeros_like(t) for t in v]
    w = [torch.zeros_like(o, requires_grad=True) for o in moving]
    back = torch.autograd.grad(moving, theta, w, create_graph=True, allow_unused=True)
    read = [b is not None for b in back]
    linear = [(i, b) for i, b in enumerate(back) if b is not None and b.requires_grad]
    through = _through([o.detach() for o in outputs], delta.scale)

    def apply(v: Tensors) -> Tensors:
        found = torch.autograd.grad(
            [b for _, b in linear],
            w,
            [v[i] for i, _ in linear],
            retain_graph=True,
            allow_unused=True,
        )
        moved = iter(torch.zeros_like(t) if f is None else f for f, t in zip(found, w))
        change = [next(moved) if o.requires_grad else torch.zeros_like(o) for o in outputs]
        asked = [c for c, o in zip(through(change), outputs) if o.requires_grad]
        pulled = torch.autograd.grad(moving, theta, asked, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if p is None else p for p, t in zip(pulled, theta)]

    return read, apply


def _through(kept: Tensors, scale: float) -> Operator:
    """From the change of A and B, or of ΔW, to what is pulled back."""
    if len(kept) == 1:
        return lambda change: change
    A, B = kept
    KA, KB, s2 = A @ A.mT, B.mT @ B, scale**2

    def pair(change: Tensors) -> Tensors:
        dA, dB = change
        return [s2 * (KB @ dA + (B.mT @ dB) @ A), s2 * (B @ (dA @ A.mT) + dB @ KA)]

    return pair


def solved(apply: Operator, g: Tensors, iterations: int) -> Tensors:
    """h of JᵀJ h = g from h = 0: the more iterations, the nearer J h to G.

    It ends where the squared residual is ε of the first, ε the precision of g: what is left is
    rounding, and has parts that JᵀJ does not see and that the next steps would blow up.
    """
    x, r = [torch.zeros_like(t) for t in g], list(g)
    p, square = r, dot(r, r)
    least = square * torch.finfo(g[0].dtype).eps
    for _ in range(iterations):
        Ap = apply(p) if square > least else []
        curved = dot(p, Ap) if Ap else 0.0
        if curved <= 0:
            break
        step = square / curved
        x = [a + step * b for a, b in zip(x, p)]
        r = [a - step * b for a, b in zip(r, Ap)]
        new = dot(r, r)
        p, square = [a + (new / square) * b for a, b in zip(r, p)], new
    return x


def dot(a: Tensors, b: Tensors) -> float:
    """⟨a, b⟩ over all tensors."""
    return float(torch.stack([(s * t).sum() for s, t in zip(a, b)]).sum())
