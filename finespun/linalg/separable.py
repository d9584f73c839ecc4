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

    The balanced factors of M, sorted by singular values, are each replaced by their nearest
    Kronecker sum (error² = Σ_{k>s} σ_k² of the rearrangement, Van Loan & Pitsianis 1993); `refine`
    iterations of L-BFGS then lower ‖BA − M‖_F itself through r x r Gram matrices. Computed in
    float64; sizes beyond those of M are zero padding.
    """
    best = target.squeeze(min(math.prod(ranks), target.rank))
    A = _fit(best.A.double(), terms[0], ranks, down)
    B = _fit(best.B.double(), terms[1], up, ranks)
    return _refine(target, A, B, refine)


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
    rank = min(math.prod(ranks), target.rank)
    best = target.squeeze(rank)
    kept = 1 - target.error(rank) ** 2
    for matrix, count, rows, columns in (
        (best.A, terms[0], ranks, down),
        (best.B, terms[1], up, ranks),
    ):
        matrix = matrix.double()
        P, Q = _fit(matrix, count, rows, columns)
        fitted = kron_sum(P, Q)[: matrix.shape[0], : matrix.shape[1]]
        size = torch.linalg.vector_norm(matrix)
        lost = torch.linalg.vector_norm(matrix - fitted) / size if size else size
        kept *= 1 - float(lost) ** 2
    return math.sqrt(max(0.0, 1 - kept))


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
