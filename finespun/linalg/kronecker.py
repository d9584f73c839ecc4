"""Choosing Kronecker shapes, and the nearest sum of Kronecker products to a matrix.

Sources: LSR-Adapt, arXiv 2502.13568; Van Loan and Pitsianis (1993); Beylkin and Mohlenkamp (2005).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from finespun.errors import InputError
from finespun.kernels.kron import kron_rearrange

SLACK = 1.10  # an exact split this close to the bound is good enough not to pad
WASTE = 0.02  # padding allowed, as a share of the dimension


@dataclass(frozen=True)
class KronShape:
    """A split r = r1·r2 and n + pad = p1·p2 for an r x n factor Σ_k (r1 x p1) ⊗ (r2 x p2)."""

    r1: int
    r2: int
    p1: int
    p2: int
    pad: int

    @property
    def ranks(self) -> tuple[int, int]:
        """(r1, r2)."""
        return self.r1, self.r2

    @property
    def sizes(self) -> tuple[int, int]:
        """(p1, p2)."""
        return self.p1, self.p2

    @property
    def numbers(self) -> int:
        """Stored values of one term: r1·p1 + r2·p2."""
        return self.r1 * self.p1 + self.r2 * self.p2


@dataclass(frozen=True)
class KronShape3:
    """A split r = r1·r2·r3 and n + pad = p1·p2·p3 for three factors a term."""

    r1: int
    r2: int
    r3: int
    p1: int
    p2: int
    p3: int
    pad: int

    @property
    def ranks(self) -> tuple[int, int, int]:
        """(r1, r2, r3)."""
        return self.r1, self.r2, self.r3

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(p1, p2, p3)."""
        return self.p1, self.p2, self.p3

    @property
    def numbers(self) -> int:
        """Stored values of one term: r1·p1 + r2·p2 + r3·p3."""
        return self.r1 * self.p1 + self.r2 * self.p2 + self.r3 * self.p3


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]


def _check_sizes(r: int, n: int) -> None:
    if r < 1 or n < 1:
        raise InputError(f"rank and dimension must be at least 1, got r={r}, n={n}")


def _check_split(split: tuple[int, ...], r: int, n: int) -> None:
    if min(split) >= 1 and math.prod(split) == r:
        return
    near = choose_factors(r, n).ranks if len(split) == 2 else choose_factors3(r, n).ranks
    raise InputError(f"rank_split {split} does not multiply to r={r}; {near} does and suits n={n}")


@lru_cache(maxsize=4096)
def choose_factors(
    r: int,
    n: int,
    *,
    prefer_unequal: bool = False,
    rank_split: tuple[int, int] | None = None,
) -> KronShape:
    """The split of rank r and dimension n that stores the fewest values per term.

    Minimises r1·p1 + r2·p2, which is at least 2·√(r·n), over r1·r2 = r and p1·p2 = n. If the best
    exact split is more than 10 % above that bound, p1·p2 may exceed n by max(1, 2 % of n); pad
    says by how much. Ties go to the smaller max(r1, r2), or with `prefer_unequal` (half the cost of
    the factorised path) to r1 = 1; then to the smaller p1. A prime r gives (1, r).
    `rank_split` fixes (r1, r2), as the second factor of a layer must share the first one's.
    Raises InputError on sizes below 1 and on a split whose product is not r.
    """
    _check_sizes(r, n)
    if rank_split is not None:
        _check_split(rank_split, r, n)
    splits = [rank_split] if rank_split else [(d, r // d) for d in _divisors(r) if d * d <= r]

    def preference(shape: KronShape) -> tuple[int, int, int, int]:
        equal = -shape.r2 if prefer_unequal else max(shape.r1, shape.r2)
        return shape.numbers, equal, shape.r1, shape.p1

    exact = min(
        (KronShape(r1, r2, p1, n // p1, 0) for r1, r2 in splits for p1 in _divisors(n)),
        key=preference,
    )
    if exact.numbers <= SLACK * 2 * math.sqrt(r * n):
        return exact
    padded = [shape for r1, r2 in splits for shape in _padded(r1, r2, n, exact.numbers)]
    best = min(padded, key=preference, default=exact)
    return best if best.numbers < exact.numbers else exact


def choose_sides(
    r: int, n_in: int, n_out: int, splits: Iterable[tuple[int, ...]] = ()
) -> tuple[list[int], list[int], list[int]]:
    """(ranks, input sizes, output sizes) of the factors of A (r, n_in) and B (n_out, r) that share
    one split of the rank and store the fewest values per term together.

    `splits` are the splits to choose from, of two numbers or three; none given means all of two.
    Raises InputError as `choose_factors` does.
    """
    found = []
    for split in splits or [(d, r // d) for d in _divisors(r)]:
        down, up = _sizes(r, n_in, split), _sizes(r, n_out, split)
        numbers = sum(part * (p + q) for part, p, q in zip(split, down, up))
        found.append((numbers, max(split), list(split), down, up))
    return min(found)[2:]


def _sizes(r: int, n: int, split: tuple[int, ...]) -> list[int]:
    if len(split) == 3:
        return list(choose_factors3(r, n, rank_split=(split[0], split[1], split[2])).sizes)
    return list(choose_factors(r, n, rank_split=(split[0], split[1])).sizes)


def _padded(r1: int, r2: int, n: int, limit: int) -> Iterator[KronShape]:
    """Splits p1, p2 = ⌈n/p1⌉ of allowed waste, each of at most as many values as those before."""
    allowed = max(1, int(WASTE * n))
    p1 = 1
    while r1 * p1 < limit:
        p2 = -(-n // p1)
        shape = KronShape(r1, r2, p1, p2, p1 * p2 - n)
        if shape.pad <= allowed and shape.numbers <= limit:
            limit = shape.numbers
            yield shape
        p1 += 1


@lru_cache(maxsize=4096)
def choose_factors3(
    r: int, n: int, *, rank_split: tuple[int, int, int] | None = None
) -> KronShape3:
    """The split into three factors that stores the fewest values per term.

    Minimises r1·p1 + r2·p2 + r3·p3, at least 3·(r·n)^(1/3), with the padding rule of
    `choose_factors`; ties go to the smallest largest r, then to the most even p.
    Worked: n = 4096 = 16³, r = 8 = 2³ stores 96 values per term. `rank_split` fixes (r1, r2, r3).
    Raises InputError on sizes below 1 and on a split whose product is not r.
    """
    _check_sizes(r, n)
    if rank_split is not None:
        _check_split(rank_split, r, n)
    splits = (
        [rank_split]
        if rank_split
        else [
            (r1, r2, r // (r1 * r2))
            for r1 in _divisors(r)
            for r2 in _divisors(r // r1)
            if r1 <= r2 <= r // (r1 * r2)
        ]
    )

    def preference(shape: KronShape3) -> tuple[int, ...]:
        p = (shape.p1, shape.p2, shape.p3)
        return (shape.numbers, max(shape.ranks), max(p), *p)

    exact = min(
        (
            KronShape3(*ranks, p1, p2, n // (p1 * p2), 0)
            for ranks in splits
            for p1 in _divisors(n)
            for p2 in _divisors(n // p1)
        ),
        key=preference,
    )
    if exact.numbers <= SLACK * 3 * math.cbrt(r * n):
        return exact
    padded = [shape for ranks in splits for shape in _padded3(ranks, n, exact.numbers)]
    best = min(padded, key=preference, default=exact)
    return best if best.numbers < exact.numbers else exact


def _padded3(ranks: tuple[int, int, int], n: int, limit: int) -> Iterator[KronShape3]:
    r1, r2, r3 = ranks
    allowed = max(1, int(WASTE * n))
    p1 = 1
    while r1 * p1 < limit:
        p2 = 1
        while r1 * p1 + r2 * p2 < limit:
            p3 = -(-n // (p1 * p2))
            shape = KronShape3(r1, r2, r3, p1, p2, p3, p1 * p2 * p3 - n)
            if shape.pad <= allowed and shape.numbers <= limit:
                limit = shape.numbers
                yield shape
            p2 += 1
        p1 += 1


def _working(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def _split(
    U: Tensor, σ: Tensor, Vh: Tensor, S: int, left: tuple[int, int], right: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Balanced terms √σ·u, √σ·v; terms beyond the number of σ are zero."""
    root = σ[..., :S].sqrt().unsqueeze(-1)
    F1, F2 = U.mT[..., :S, :] * root, Vh[..., :S, :] * root
    missing = S - F1.shape[-2]
    if missing > 0:
        F1, F2 = (torch.nn.functional.pad(F, (0, 0, 0, missing)) for F in (F1, F2))
    return F1.reshape(*F1.shape[:-1], *left), F2.reshape(*F2.shape[:-1], *right)


def nearest_kronecker_sum(
    M: Tensor, S: int, a: int, b: int, i: int, j: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The S-term Σ_k P_k ⊗ Q_k nearest to M (..., a·b, i·j) in Frobenius norm, and its distance.

    Truncated SVD of the rearranged matrix, split as √σ into both factors: P (..., S, a, i),
    Q (..., S, b, j), and ‖M − Σ_k P_k ⊗ Q_k‖ = sqrt(Σ_{k>S} σ_k²), of shape (...).
    S above min(a·i, b·j) adds zero terms. Half precision is computed in float32 and rounded once.
    Raises InputError when S < 1 or M is not (..., a·b, i·j).
    """
    if S < 1:
        raise InputError(f"a Kronecker sum has at least 1 term, got S={S}")
    (R,) = _working(kron_rearrange(M, a, b, i, j))
    U, σ, Vh = torch.linalg.svd(R, full_matrices=False)
    P, Q = _split(U, σ, Vh, S, (a, i), (b, j))
    return P.to(M.dtype), Q.to(M.dtype), torch.linalg.vector_norm(σ[..., S:], dim=-1)


def rebalance(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Other terms with the same sum and condition 1: orthogonal, equal norms, sorted by size.

    P (..., S, a, i), Q (..., S, b, j), shapes kept. QR of F1ᵀ and F2ᵀ, SVD of the S x S core, √σ
    into both: O(S²·(a·i + b·j)). Half precision is computed in float32 and rounded once.
    """
    F1, F2 = _working(P.flatten(-2), Q.flatten(-2))
    Q1, R1 = torch.linalg.qr(F1.mT)
    Q2, R2 = torch.linalg.qr(F2.mT)
    U, σ, Vh = torch.linalg.svd(R1 @ R2.mT, full_matrices=False)
    left, right = (P.shape[-2], P.shape[-1]), (Q.shape[-2], Q.shape[-1])
    P_new, Q_new = _split(Q1 @ U, σ, Vh @ Q2.mT, P.shape[-3], left, right)
    return P_new.to(P.dtype), Q_new.to(Q.dtype)


def condition(P: Tensor, Q: Tensor) -> Tensor:
    """κ = sqrt(Σ_k ‖P_k‖²·‖Q_k‖²) / ‖Σ_k P_k ⊗ Q_k‖, of shape (...) for stacked layers.

    κ times the rounding unit bounds the relative error that rounding the terms brings to the sum.
    Terms that cancel completely give infinity; terms that are all zero give 1.
    """
    F1, F2 = _working(P.flatten(-2), Q.flatten(-2))
    sizes = torch.linalg.vector_norm(F1, dim=-1) * torch.linalg.vector_norm(F2, dim=-1)
    terms = torch.linalg.vector_norm(sizes, dim=-1)
    whole = torch.linalg.matrix_norm(F1.mT @ F2)
    return torch.where(terms == 0, torch.ones_like(terms), terms / whole)
