"""How well the first step follows the gradient of the weights, and parameters that follow better.

One step of gradient descent with lr t moves W by −t·J Jᵀ G, J = ∂ΔW/∂θ, to first order: it follows
full training where cos(J Jᵀ G, G) is near one.
"""

import torch
from torch import Tensor
from torch.func import vjp

from finespun.contract import Delta
from finespun.contract.calculus import called, parameters_of

PACE = 0.15  # of the parameters' size, a step of Adam


def step_cosine(delta: Delta, G: Tensor, theta: dict[str, Tensor] | None = None) -> Tensor:
    """cos(J Jᵀ G, G) of an update with factors, through r x r Gram matrices; differentiable in
    `theta`, the delta's parameters unless given. 0 where nothing moves."""
    theta = parameters_of(delta) if theta is None else theta
    G = G.to(next(iter(theta.values())))

    def factors(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        A, B = called(delta, t, "factors")
        return A, B

    (A, B), back = vjp(factors, theta)[:2]
    g = back((B.mT @ G, G @ A.mT))[0]
    # g -> J g as the pull of the linear map back: no second kind of derivative is needed.
    dA, dB = vjp(lambda u: back(u)[0], (A, B))[1](g)[0]
    left, right = torch.cat([B, dB], 1), torch.cat([dA, A])
    size = ((left.mT @ left) * (right @ right.mT)).sum().clamp_min(1e-30).sqrt()
    return sum((v * v).sum() for v in g.values()) / (size * G.norm())


@torch.enable_grad()
def align(delta: Delta, G: Tensor, steps: int) -> float:
    """Move the delta's parameters by `steps` of Adam so that cos(J Jᵀ G, G) rises, keep the sizes
    of A and B, and return the cosine; the best point is taken, the first one included."""
    sizes = [float(t.detach().norm()) for t in delta.low_rank() or ()]
    theta = {n: t.clone().requires_grad_() for n, t in parameters_of(delta).items()}
    groups = [
        {"params": [t], "lr": PACE * float(t.detach().square().mean().sqrt())}
        for t in theta.values()
    ]
    optimizer = torch.optim.Adam(groups)
    best, point = -1.0, {n: t.detach().clone() for n, t in theta.items()}
    for step in range(steps + 1):
        found = step_cosine(delta, G, theta)
        if float(found.detach()) > best:
            best, point = float(found.detach()), {n: t.detach().clone() for n, t in theta.items()}
        if step < steps:
            optimizer.zero_grad()
            (-found).backward()
            optimizer.step()
    resized(delta, point, sizes)
    with torch.no_grad():
        for name, parameter in delta.named_parameters():
            parameter.copy_(point[name])
    return float(step_cosine(delta, G))


def resized(delta: Delta, theta: dict[str, Tensor], sizes: list[float]) -> None:
    """Bring A and B at `theta` to these norms. A side is a polynomial of its parameters of one
    degree d, which Euler's ⟨∂‖A‖²/∂θ, θ⟩ = 2d ‖A‖² gives."""
    for which, size in enumerate(sizes):
        free = {n: t.clone().requires_grad_() for n, t in theta.items()}
        side = called(delta, free, "low_rank")[which]
        square = side.square().sum()
        slopes = torch.autograd.grad(square, list(free.values()), allow_unused=True)
        own = {n: g for n, g in zip(free, slopes) if g is not None and bool(g.any())}
        if not own:
            continue
        degree = sum(float((g * free[n].detach()).sum()) for n, g in own.items())
        degree /= 2 * float(square.detach())
        for name in own:
            theta[name] *= (size / float(square.detach().sqrt())) ** (1 / degree)
