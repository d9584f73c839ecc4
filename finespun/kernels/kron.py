"""Sums of Kronecker products: forming them, applying them, and what each way costs.

Notation of every function: S terms, P_k (a x i) and Q_k (b x j), and their sum
M = Σ_k P_k ⊗ Q_k of shape (a·b) x (i·j), row-major: M[α·b + β, ι·j + κ] = Σ_k P_k[α,ι]·Q_k[β,κ].

The rearrangement R(M)[(α,ι), (β,κ)] = M[(α,β), (ι,κ)] of Van Loan and Pitsianis (1993) turns the
sum into a plain product of inner size S, R(M) = F1ᵀ F2, where row k of F1 is vec(P_k) and row k of
F2 is vec(Q_k). Hence forming M is one GEMM and one permute.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from finespun.errors import InputError

Order = Literal["first", "second"]
Path = Literal["formed", "factorised"]


def kron_rearrange(M: Tensor, a: int, b: int, i: int, j: int) -> Tensor:
    """R(M): (..., a·b, i·j) -> (..., a·i, b·j); keeps every number, hence the Frobenius norm.

    Raises InputError when M is not (..., a·b, i·j).
    """
    if M.dim() < 2 or M.shape[-2:] != (a * b, i * j):
        raise InputError(
            f"expected (..., {a * b}, {i * j}) for a={a} b={b} i={i} j={j}, got {tuple(M.shape)}"
        )
    blocks = M.reshape(*M.shape[:-2], a, b, i, j)
    return blocks.transpose(-3, -2).reshape(*M.shape[:-2], a * i, b * j)


def kron_restore(R: Tensor, a: int, b: int, i: int, j: int) -> Tensor:
    """Inverse of `kron_rearrange`: (..., a·i, b·j) -> (..., a·b, i·j).

    Raises InputError when R is not (..., a·i, b·j).
    """
    if R.dim() < 2 or R.shape[-2:] != (a * i, b * j):
        raise InputError(
            f"expected (..., {a * i}, {b * j}) for a={a} b={b} i={i} j={j}, got {tuple(R.shape)}"
        )
    blocks = R.reshape(*R.shape[:-2], a, i, b, j)
    return blocks.transpose(-3, -2).reshape(*R.shape[:-2], a * b, i * j)


def _check_terms(*factors: Tensor) -> None:
    shapes = [tuple(f.shape) for f in factors]
    if any(len(shape) < 3 for shape in shapes) or len({shape[-3] for shape in shapes}) != 1:
        shown = " and ".join(map(str, shapes))
        raise InputError(f"factors must be (..., S, rows, columns) with one S, got {shown}")


def kron_sum(P: Tensor, Q: Tensor) -> Tensor:
    """Σ_k P_k ⊗ Q_k as one GEMM: P (..., S, a, i), Q (..., S, b, j) -> (..., a·b, i·j).

    Leading dimensions are stacked layers (one bmm for all of them); they broadcast.
    S·a·b·i·j multiply-adds; nothing larger than the result is ever held.
    Raises InputError when the factors disagree on S.
    """
    _check_terms(P, Q)
    R = P.flatten(-2).mT @ Q.flatten(-2)
    return kron_restore(R, P.shape[-2], Q.shape[-2], P.shape[-1], Q.shape[-1])


def kron_sum_many(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """`kron_sum` of every pair, with one bmm for each group of equal shapes, dtype and device.

    Results come in the order of `pairs`; each one's gradient flows to its own factors.
    """
    groups: dict[object, list[int]] = {}
    for index, (P, Q) in enumerate(pairs):
        like = (P.shape, P.dtype, P.device, Q.shape, Q.dtype, Q.device)
        groups.setdefault(like, []).append(index)
    formed: dict[int, Tensor] = {}
    for members in groups.values():
        if len(members) == 1:
            formed[members[0]] = kron_sum(*pairs[members[0]])
            continue
        P = torch.stack([pairs[m][0] for m in members])
        Q = torch.stack([pairs[m][1] for m in members])
        formed.update(zip(members, kron_sum(P, Q).unbind(0)))
    return [formed[index] for index in range(len(pairs))]


def kron_sum3(P: Tensor, Q: Tensor, T: Tensor) -> Tensor:
    """Σ_k P_k ⊗ Q_k ⊗ T_k: (..., S, a, i), (..., S, b, j), (..., S, c, l) -> (..., a·b·c, i·j·l).

    The two smaller factors are multiplied term by term, the largest, of m values per term, comes in
    by a GEMM of inner size S: beside the result only S/m of its size is held.
    Raises InputError when the factors disagree on S.
    """
    _check_terms(P, Q, T)
    factors = (P, Q, T)
    sizes = [f.shape[-2] * f.shape[-1] for f in factors]
    big = sizes.index(max(sizes))
    one, two = (t for t in range(3) if t != big)
    small = factors[one].flatten(-2).unsqueeze(-1) * factors[two].flatten(-2).unsqueeze(-2)
    full = factors[big].flatten(-2).mT @ small.flatten(-2)
    lead = full.shape[:-2]
    modes = [size for t in (big, one, two) for size in factors[t].shape[-2:]]
    place = {t: n for n, t in enumerate((big, one, two))}
    base = len(lead)
    rows = [base + 2 * place[t] for t in range(3)]
    columns = [base + 2 * place[t] + 1 for t in range(3)]
    blocks = full.reshape(*lead, *modes).permute(*range(base), *rows, *columns)
    height = P.shape[-2] * Q.shape[-2] * T.shape[-2]
    return blocks.reshape(*lead, height, P.shape[-1] * Q.shape[-1] * T.shape[-1])


def kron_apply(P: Tensor, Q: Tensor, x: Tensor, order: Order | None = None) -> Tensor:
    """(Σ_k P_k ⊗ Q_k) x without forming the sum: x (..., i·j) -> (..., a·b).

    With X the i x j view of x, the result is Σ_k P_k X Q_kᵀ. `order="first"` contracts the first
    factors before the second, `"second"` the other way round; None takes the one of fewer
    multiply-adds (`kron_macs`). P (S, a, i), Q (S, b, j); stacked layers go through
    `torch.func.vmap`. Raises InputError on shapes that do not fit.
    """
    _check_terms(P, Q)
    if P.dim() != 3 or Q.dim() != 3 or x.dim() == 0 or x.shape[-1] != P.shape[-1] * Q.shape[-1]:
        raise InputError(
            f"expected P (S, a, i), Q (S, b, j), x (..., i*j), got {tuple(P.shape)}, "
            f"{tuple(Q.shape)}, {tuple(x.shape)}"
        )
    (S, a, i), (b, j) = P.shape, Q.shape[-2:]
    if order is None:
        first, second = (kron_macs(S, a, b, i, j, o) for o in ("first", "second"))
        order = "first" if first <= second else "second"
    if order == "first":
        half = P.transpose(0, 1).reshape(a * S, i) @ x.reshape(-1, i, j)
        out = half.reshape(-1, S * j) @ Q.transpose(0, 1).reshape(b, S * j).mT
    else:
        half = x.reshape(-1, j) @ Q.reshape(S * b, j).mT
        out = P.permute(1, 2, 0).reshape(a, i * S) @ half.reshape(-1, i * S, b)
    return out.reshape(*x.shape[:-1], a * b)


def kron_macs(S: int, a: int, b: int, i: int, j: int, order: Order | None = None) -> int:
    """Multiply-adds a token of `kron_apply`: S·a·j·(i + b) first, S·i·b·(j + a) second; without an
    order the fewer.

    Raises InputError on an unknown order.
    """
    if order is None:
        return min(S * a * j * (i + b), S * i * b * (j + a))
    if order == "first":
        return S * a * j * (i + b)
    if order == "second":
        return S * i * b * (j + a)
    raise InputError(f"order must be 'first' or 'second', got {order!r}")


def form_macs(S: int, a: int, b: int, i: int, j: int) -> int:
    """Multiply-adds of `kron_sum`, whatever the number of tokens: S·a·b·i·j."""
    return S * a * b * i * j
