"""The product of two Kronecker sums that is nearest to a given low-rank matrix.

(Σ_k B1_k ⊗ B2_k)(Σ_l A1_l ⊗ A2_l) ≈ M, the form of LSR-Adapt (arXiv 2502.13568).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finespun.kernels.kron import kron_sum
from finespun.linalg.kronecker import nearest_kronecker_sum
from finespun.linalg.lowrank import LowRank

Pair = tuple[Tensor, Tensor]
ROUNDS = 12


class Separable(NamedTuple):
    """A1 (s, r1, p1), A2 (s, r2, p2); B1 (s, q1, r1), B2 (s, q2, r2); the relative error."""

    A: Pair
    B: Pair
    error: float


def nearest_separable(
    target: LowRank,
    ranks: Sequence[int],
    down: Sequence[int],
    up: Sequence[int],
    terms: Sequence[int],
    refine: int = 0,
) -> Separable:
    """Project M = target onto ranks (r1, r2), sizes (p1, p2) and (q1, q2) and terms (s_A, s_B).

    Factors of M are each replaced by their nearest Kronecker sum (error² = Σ_{k>s} σ_k² of the
    rearrangement, Van Loan & Pitsianis 1993): the balanced ones, sorted by singular values, or,
    where they lie closer and have the rank, those that M was given by, so that what was a product
    of Kronecker sums, without padding, comes back exactly. `refine` iterations of L-BFGS then
    lower ‖BA − M‖_F itself through r x r Gram matrices. Computed in float64; sizes beyond those of
    M are zero padding.
    """
    fits = []
    for start in _starts(target, math.prod(ranks)):
        A = _fit(start.A.double(), terms[0], ranks, down)
        B = _fit(start.B.double(), terms[1], up, ranks)
        fits.append(_refine(target, A, B, 0))
    best = min(fits, key=lambda fit: fit.error)
    return _refine(target, best.A, best.B, refine) if refine else best


def _starts(target: LowRank, rank: int) -> list[LowRank]:
    """Factors of the target that may be projected."""
    balanced = target.squeeze(min(rank, target.rank))
    return [balanced, target] if target.rank == rank else [balanced]


def nearest_sides(
    A: Tensor,
    B: Tensor,
    ranks: Sequence[int],
    down: Sequence[int],
    up: Sequence[int],
    terms: Sequence[int],
    apart: bool = False,
    refine: int = 0,
    rounds: int = ROUNDS,
) -> Separable:
    """Kronecker sums Â and B̂ nearest to A (r, in) and B (out, r), where the r directions may be
    turned by an orthogonal Q, which leaves B A.

    min ‖Â − Q A‖² + ‖B̂ − B Qᵀ‖², the nearest sums and Q = polar(Â Aᵀ + B̂ᵀ B) in turn, so that the
    error never rises. With `apart` Q of A and of B are two, which leaves AᵀA and B Bᵀ, and each sum
    is brought to the norm of what it stands for. `refine` as in `nearest_separable`. The error is
    that of the product, ‖B̂ Â − B A‖ / ‖B A‖. Computed in float64.
    """
    A, B = A.double(), B.double()
    Q = [torch.eye(len(A), dtype=A.dtype, device=A.device)] * 2
    for _ in range(rounds):
        left, right = _fit(Q[0] @ A, terms[0], ranks, down), _fit(B @ Q[1].mT, terms[1], up, ranks)
        turned = _cut(left, A) @ A.mT, _cut(right, B).mT @ B
        Q = [polar(t) for t in turned] if apart else [polar(turned[0] + turned[1])] * 2
    if apart:
        left, right = _sized(left, A), _sized(right, B)
    return _refine(LowRank(A, B), left, right, refine)


def _cut(pair: Pair, like: Tensor) -> Tensor:
    """The sum without its padding."""
    return kron_sum(*pair)[: like.shape[0], : like.shape[1]]


def _sized(pair: Pair, like: Tensor) -> Pair:
    """The sum at the norm of what it stands for."""
    size = torch.linalg.vector_norm(_cut(pair, like))
    root = (torch.linalg.vector_norm(like) / size).sqrt() if size > 0 else size
    return pair[0] * root, pair[1] * root


def polar(M: Tensor) -> Tensor:
    """The orthogonal matrix nearest to M."""
    U, _, Vh = torch.linalg.svd(M)
    return U @ Vh


def predicted_error(
    target: LowRank,
    ranks: Sequence[int],
    down: Sequence[int],
    up: Sequence[int],
    terms: Sequence[int],
) -> float:
    """What relative error to expect of `nearest_separable` without refinement:
    sqrt(1 − (1 − e_r²)(1 − e_A²)(1 − e_B²)), with e_r of cutting the rank, and e_A, e_B of the
    Kronecker sums alone. It holds where these two spread evenly over the ranks."""
    cut = 1 - target.error(min(math.prod(ranks), target.rank)) ** 2
    kept = [
        cut * _kept(start.A, terms[0], ranks, down) * _kept(start.B, terms[1], up, ranks)
        for start in _starts(target, math.prod(ranks))
    ]
    return math.sqrt(max(0.0, 1 - max(kept)))


def _kept(matrix: Tensor, terms: int, rows: Sequence[int], columns: Sequence[int]) -> float:
    """The share of the squared norm that the nearest Kronecker sum keeps."""
    matrix = matrix.double()
    fitted = kron_sum(*_fit(matrix, terms, rows, columns))[: matrix.shape[0], : matrix.shape[1]]
    size = float(torch.linalg.vector_norm(matrix))
    return 1 - (float(torch.linalg.vector_norm(matrix - fitted)) / size) ** 2 if size else 1.0


def _fit(matrix: Tensor, terms: int, rows: Sequence[int], columns: Sequence[int]) -> Pair:
    padded = matrix.new_zeros(math.prod(rows), math.prod(columns))
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    P, Q, _ = nearest_kronecker_sum(padded, terms, *rows, *columns)
    return P, Q


def _refine(target: LowRank, A: Pair, B: Pair, iterations: int) -> Separable:
    free = [f.detach().contiguous().clone().requires_grad_(iterations > 0) for f in (*A, *B)]
    A0, B0 = target.A.detach().double(), target.B.detach().double()
    size = LowRank(A0, B0).norm().square().clamp_min(torch.finfo(torch.float64).tiny)

    def error() -> Tensor:
        left = kron_sum(free[0], free[1])[:, : A0.shape[1]]
        right = kron_sum(free[2], free[3])[: B0.shape[0]]
        own = ((right.T @ right) * (left @ left.T)).sum()
        cross = ((right.T @ B0) * (left @ A0.T)).sum()
        return (own - 2 * cross + size) / size

    if iterations:
        optimizer = torch.optim.LBFGS(free, max_iter=iterations, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = error()
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
    A1, A2, B1, B2 = (f.detach() for f in free)
    return Separable((A1, A2), (B1, B2), float(error().detach().clamp_min(0).sqrt()))
