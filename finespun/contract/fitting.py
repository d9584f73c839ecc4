"""The nearest of another update that a form can say: damped least squares over its parameters.

With θ the trained parameters, r(θ) = (ΔW(θ) − U)·C^½ and J = ∂r/∂θ: each step solves
(JᵀJ + μ) d = −Jᵀ r by conjugate gradients, is taken where ‖r‖ falls, and changes μ accordingly.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vjp

from finespun.contract.bank import Bank
from finespun.contract.calculus import called, parameters_of
from finespun.contract.wrapping import Wrapped
from finespun.linalg import LowRank

STEPS, INNER = 16, 16
ENOUGH = 1e-7  # of ‖U‖
STUCK = 0.999  # of ‖U‖: so far from anywhere that another beginning is tried
GAIN = 1e-4  # of ‖r‖: a step that gains less is the last
WIDE = torch.float64

Theta = dict[str, Tensor]


def fit(delta: Wrapped, update: LowRank | Tensor, covariance: Tensor | None = None) -> float:
    """Make the delta, and the bank it reads, the nearest of `update` (out, in) that is found from
    its present parameters or, where they lead nowhere, from a draw around them; returns the
    relative error."""
    return fit_all([delta], [update], covariance)[0]


def fit_all(
    deltas: Sequence[Wrapped],
    updates: Sequence[LowRank | Tensor],
    covariance: Tensor | None = None,
) -> list[float]:
    """`fit` of deltas that read one bank, all at once: the sum of their squared errors falls.
    Returns the relative error of each."""
    root = None if covariance is None else square_root(covariance.to(WIDE))
    wanted = [weighted(_wide(u, d), root) for d, u in zip(deltas, updates)]
    bank = deltas[0].bank
    shared = None if bank is None else copy.deepcopy(bank).double()
    twins = [in_double(delta, shared) for delta in deltas]
    bases = [_base(twin) for twin in twins]

    def residuals(theta: Theta) -> list[Tensor]:
        found = (
            called(t, _own(theta, i), "dense", w0) for i, (t, w0) in enumerate(zip(twins, bases))
        )
        return [weighted(W, root) - U for W, U in zip(found, wanted)]

    def residual(theta: Theta) -> Tensor:
        return torch.cat([r.flatten() for r in residuals(theta)])

    start = _joined([parameters_of(twin) for twin in twins])
    masks = _joined([delta.masks() for delta in deltas])
    size = sum(float(U.norm()) ** 2 for U in wanted) ** 0.5
    best, least = start, float("inf")
    for attempt in range(2):
        theta, error = descend(residual, drawn(start, attempt), masks, size)
        if error < least:
            best, least = theta, error
        if least < STUCK * size:
            break
    with torch.no_grad():
        for i, delta in enumerate(deltas):
            for name, value in parameters_of(delta).items():
                value.copy_(_own(best, i)[name])
        sizes = ((float(r.norm()), float(U.norm())) for r, U in zip(residuals(best), wanted))
        return [error / norm if norm else error for error, norm in sizes]


def _wide(update: LowRank | Tensor, delta: Wrapped) -> Tensor:
    dense = update.dense() if isinstance(update, LowRank) else update
    return dense.detach().to(delta.site.device, WIDE)


def _base(twin: Wrapped) -> Tensor:
    """What `dense` is given: W0, or its shape alone where nothing else is read."""
    ready = twin.low_rank() is not None or not twin.reads_base
    return (twin.blank() if ready else twin.base_weight()).to(WIDE)


def _joined(each: Sequence[Theta]) -> Theta:
    """Parameters of several deltas in one dictionary, those of their bank once."""
    return {
        n if n.startswith("bank.") else f"{i}/{n}": t
        for i, own in enumerate(each)
        for n, t in own.items()
    }


def _own(theta: Theta, i: int) -> Theta:
    """The parameters of delta i, its bank's included."""
    mine = f"{i}/"
    return {n.removeprefix(mine): t for n, t in theta.items() if n.startswith((mine, "bank."))}


def truncated(
    update: LowRank | Tensor, rank: int, covariance: Tensor | None = None
) -> tuple[LowRank, float]:
    """The best approximation of at most this rank in the metric of `covariance`, and its relative
    error; an update that has no more comes back as it is."""
    exact = update if isinstance(update, LowRank) else LowRank.from_dense(update)
    if covariance is None:
        best = exact if exact.rank <= rank else exact.squeeze(rank)
        return best, distance(best, exact)
    C = covariance.to(WIDE)
    root, back = square_root(C), square_root(C, inverse=True)
    white = LowRank(exact.A.to(WIDE) @ root, exact.B.to(WIDE))
    best = white if white.rank <= rank else white.squeeze(rank)
    return LowRank((best.A @ back).to(exact.A.dtype), best.B.to(exact.B.dtype)), distance(
        best, white
    )


def distance(found: LowRank, exact: LowRank) -> float:
    """‖found − exact‖ / ‖exact‖; 0 where both are zero."""
    a, b = (LowRank(one.A.to(WIDE), one.B.to(WIDE)) for one in (found, exact))
    size = float(b.norm())
    return float((a - b).norm()) / size if size else float(a.norm())


def in_double(delta: Wrapped, bank: Bank | None) -> Wrapped:
    """A copy in float64 that shares nothing but the site and this copy of its bank."""
    memo: dict[int, object] = {id(delta.site): delta.site}
    if delta.bank is not None:
        memo[id(delta.bank)] = bank
    twin = copy.deepcopy(delta, memo).double()
    twin.refer(delta.site, bank)
    return twin


def descend(
    residual: Callable[[Theta], Tensor], theta: Theta, masks: Theta, size: float
) -> tuple[Theta, float]:
    """Parameters at which ‖r‖ falls no further, and ‖r‖."""
    r = residual(theta)
    error, damping = float(r.norm()), 1e-3
    for _ in range(STEPS):
        back = vjp(residual, theta)[1]
        # v -> J v as the pull of the linear map r -> Jᵀ r: no forward pass is run again for it.
        forth = vjp(lambda u, back=back: back(u)[0], r)[1]
        g = masked(back(r)[0], masks)
        if error <= ENOUGH * size or not norm(g) > 0:
            break
        scale = norm(g) ** 2 / max(float(forth(g)[0].norm()) ** 2, 1e-300)
        for _ in range(8):
            d = solve(forth, back, g, damping / scale, masks)
            new = {k: theta[k] - d[k] for k in theta}
            r_new = residual(new)
            gained = error - float(r_new.norm())
            if gained > 0:
                break
            damping *= 8
        else:
            break
        theta, r, error, damping = new, r_new, error - gained, max(damping / 8, 1e-12)
        if gained <= GAIN * error:
            break
    return theta, error


def solve(
    forth: Callable[[Theta], tuple[Tensor]],
    back: Callable[[Tensor], tuple[Theta]],
    g: Theta,
    damping: float,
    masks: Theta,
) -> Theta:
    """d with (JᵀJ + damping) d = g, by conjugate gradients."""
    d = {k: torch.zeros_like(v) for k, v in g.items()}
    rest, p, square = g, g, norm(g) ** 2
    first = square
    for _ in range(INNER):
        Ap = masked(back(forth(p)[0])[0], masks)
        Ap = {k: v + damping * p[k] for k, v in Ap.items()}
        step = square / max(float(sum((p[k] * Ap[k]).sum() for k in p)), 1e-300)
        d = {k: v + step * p[k] for k, v in d.items()}
        rest = {k: v - step * Ap[k] for k, v in rest.items()}
        after = norm(rest) ** 2
        if after <= 1e-12 * first:
            break
        p = {k: v + after / square * p[k] for k, v in rest.items()}
        square = after
    return d


def drawn(start: Theta, attempt: int) -> Theta:
    """The parameters themselves, or (attempt 1) moved by half their size, by a fifth where they are
    zero."""
    if not attempt:
        return dict(start)
    generator = torch.Generator().manual_seed(attempt)
    found = {}
    for name, value in start.items():
        size = float(value.square().mean().sqrt()) if value.numel() else 0.0
        noise = torch.randn(value.shape, generator=generator, dtype=WIDE).to(value.device)
        found[name] = value + 0.5 * (size or 0.2) * noise
    return found


def masked(v: Theta, masks: Theta) -> Theta:
    """Parameters that are dead stay as they are."""
    return {k: t * masks[k] if k in masks else t for k, t in v.items()}


def norm(v: Theta) -> float:
    """Euclidean norm over all tensors."""
    return float(sum(t.square().sum() for t in v.values())) ** 0.5


def weighted(W: Tensor, root: Tensor | None) -> Tensor:
    """W·C^½."""
    return W if root is None else W @ root


def square_root(C: Tensor, inverse: bool = False) -> Tensor:
    """C^½ of a symmetric matrix without negative eigenvalues, or its pseudo-inverse."""
    values, Q = torch.linalg.eigh(C)
    least = float(values[-1].clamp_min(0)) * len(C) * torch.finfo(C.dtype).eps
    root = values.clamp_min(0).sqrt()
    if inverse:
        root = torch.where(values > least, 1 / root, 0.0)
    return (Q * root) @ Q.mT
