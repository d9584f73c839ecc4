"""A matrix held as a product of two thin ones, and its compression to fewer ranks.

Source of the compression: LoRA-Squeeze, arXiv 2602.10993.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finespun.errors import InputError


class SVD(NamedTuple):
    """M = U·diag(S)·Vh with orthonormal columns of U (out, k) and rows of Vh (k, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def _working(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _tails(σ: Tensor) -> Tensor:
    """tails[r] = Σ_{i>r} σ_i², r = 0..k, in float64 and summed from the small end."""
    energy = σ.detach().cpu().double().square().flip(0).cumsum(0).flip(0)
    return torch.cat([energy, energy.new_zeros(1)])


def _chosen_rank(σ: Tensor, rank: int | None, energy: float | None, most: int) -> int:
    if rank is not None and not 1 <= rank <= most:
        raise InputError(
            f"rank must be 1..{most} here, got {rank}; nearest: {min(max(rank, 1), most)}"
        )
    if energy is None:
        return most if rank is None else rank
    if not 0 < energy <= 1:
        raise InputError(f"energy is a share between 0 and 1, such as 0.95, got {energy}")
    tails = _tails(σ)
    enough = int((tails > (1 - energy) * tails[0]).sum())
    return min(max(enough, 1), most if rank is None else rank)


@dataclass(frozen=True, eq=False)
class LowRank:
    """M = B·A with A (r, in) and B (out, r); nothing but `dense` ever holds out x in values.

    Any scale of an adapter is folded into B by the caller. Raises InputError when A and B disagree
    on r.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.A.dim() != 2 or self.B.dim() != 2 or self.A.shape[0] != self.B.shape[1]:
            raise InputError(
                f"expected A (r, in) and B (out, r) with one r, got {tuple(self.A.shape)} and "
                f"{tuple(self.B.shape)}"
            )

    @classmethod
    def from_dense(
        cls, M: Tensor, rank: int | None = None, energy: float | None = None
    ) -> "LowRank":
        """The nearest matrix to M (out, in) of the given rank, by a full SVD, balanced and sorted.

        `energy` instead takes the smallest rank that keeps that share of ‖M‖²; with both, the
        smaller of the two; with neither, all min(out, in). Raises InputError on either's range.
        """
        if M.dim() != 2:
            raise InputError(f"expected a matrix (out, in), got shape {tuple(M.shape)}")
        svd = SVD(*torch.linalg.svd(_working(M), full_matrices=False))
        return cls.from_svd(svd, _chosen_rank(svd.S, rank, energy, min(M.shape)), M.dtype)

    @classmethod
    def from_svd(cls, svd: SVD, rank: int, dtype: torch.dtype) -> "LowRank":
        """The first `rank` directions, √σ into both factors; ranks beyond the values are zero."""
        root = svd.S[:rank].sqrt()
        A, B = root[:, None] * svd.Vh[:rank], svd.U[:, :rank] * root
        missing = rank - root.numel()
        if missing > 0:
            A = torch.nn.functional.pad(A, (0, 0, 0, missing))
            B = torch.nn.functional.pad(B, (0, missing))
        return cls(A.to(dtype), B.to(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of stored directions r, whether or not they are independent."""
        return self.A.shape[0]

    @property
    def T(self) -> "LowRank":
        """The transpose, (in, out)."""
        return LowRank(self.B.mT, self.A.mT)

    def __matmul__(self, x: Tensor) -> Tensor:
        """M·x for x (in,) or (..., in, n)."""
        return self.B @ (self.A @ x)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """x·M for x (out,) or (..., n, out)."""
        return (x @ self.B) @ self.A

    def __add__(self, other: "LowRank") -> "LowRank":
        """The sum, exactly, of rank r + r'. Raises InputError when shapes differ."""
        self._check_same_shape(other)
        return LowRank(torch.cat([self.A, other.A]), torch.cat([self.B, other.B], dim=1))

    def __sub__(self, other: "LowRank") -> "LowRank":
        return self + (-other)

    def __neg__(self) -> "LowRank":
        return LowRank(self.A, -self.B)

    def __mul__(self, scale: float | Tensor) -> "LowRank":
        """scale·M; the scale goes into B."""
        return LowRank(self.A, self.B * scale)

    __rmul__ = __mul__

    def dense(self) -> Tensor:
        """The matrix itself, (out, in)."""
        return self.B @ self.A

    def norm(self) -> Tensor:
        """‖M‖_F from the r x r core of two QRs, so that a difference of near-equals is accurate."""
        norm: Tensor = torch.linalg.vector_norm(self._core()[1])
        return norm

    def inner(self, other: "LowRank") -> Tensor:
        """⟨M, M'⟩ = Σ M∘M' = Σ (BᵀB')∘(AA'ᵀ). Raises InputError when shapes differ."""
        self._check_same_shape(other)
        return ((self.B.mT @ other.B) * (self.A @ other.A.mT)).sum()

    def svd(self) -> SVD:
        """Exact SVD, k = min(r, out, in) values, in O((out + in)·r² + r³).

        B = Q_B·R_B, Aᵀ = Q_A·R_A, and R_B·R_Aᵀ = U·S·Vh is r x r. Half precision is computed and
        returned in float32.
        """
        Q_B, core, Q_A = self._core()
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        return SVD(Q_B @ U, S, Vh @ Q_A.mT)

    def singular_values(self) -> Tensor:
        """The min(r, out, in) singular values, falling; all others of M are zero."""
        values: Tensor = torch.linalg.svdvals(self._core()[1])
        return values

    def error(self, rank: int) -> float:
        """Relative error of the best approximation of that rank: sqrt(Σ_{i>rank} σ_i² / Σ σ_i²)."""
        if rank < 0:
            raise InputError(f"rank must be at least 0, got {rank}")
        tails = _tails(self.singular_values())
        if rank >= len(tails) or tails[0] == 0:
            return 0.0
        return math.sqrt(float(tails[rank] / tails[0]))

    def squeeze(self, rank: int | None = None, energy: float | None = None) -> "LowRank":
        """The nearest matrix of smaller rank, with the error `error(rank)` (Eckart and Young).

        Balanced, BᵀB = AAᵀ = diag(σ), and sorted by σ: the first k rows of A and columns of B are
        `squeeze(k)`. `energy` instead takes the smallest rank that keeps that share of ‖M‖²; with
        both, the smaller of the two; with neither, rank stays. Ranks above min(out, in) come as
        zeros. Half precision is computed in float32 and rounded once.
        Raises InputError when rank is not 1..r or energy not in (0, 1].
        """
        svd = self.svd()
        return self.from_svd(svd, _chosen_rank(svd.S, rank, energy, self.rank), self.A.dtype)

    def revive(self, generator: torch.Generator | None = None) -> "LowRank":
        """Directions that carry nothing made trainable again: column of B zero, row of A random.

        Direction i is dead when ‖b_i‖·‖a_i‖ <= r·ε times the largest, ε that of the dtype that SVDs
        are computed in; the product moves by no more than that. A fresh row has the mean norm of
        the living rows, or 1/√3 (that of Kaiming's start) when there are none. The generator lives
        on the CPU.
        """
        if self.rank == 0:
            return self
        A, B = _working(self.A), _working(self.B)
        lengths = torch.linalg.vector_norm(A, dim=1)
        sizes = lengths * torch.linalg.vector_norm(B, dim=0)
        dead = sizes <= self.rank * torch.finfo(A.dtype).eps * sizes.max()
        typical = lengths[~dead].mean() if bool((~dead).any()) else A.new_tensor(3).rsqrt()
        fresh = torch.randn(A.shape, generator=generator, dtype=A.dtype).to(A.device)
        fresh = torch.nn.functional.normalize(fresh, dim=1) * typical
        A = torch.where(dead[:, None], fresh.to(self.A.dtype), self.A)
        return LowRank(A, self.B.masked_fill(dead, 0))

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        Q_B, R_B = torch.linalg.qr(_working(self.B))
        Q_A, R_A = torch.linalg.qr(_working(self.A).mT)
        return Q_B, R_B @ R_A.mT, Q_A

    def _check_same_shape(self, other: "LowRank") -> None:
        if self.shape != other.shape:
            raise InputError(f"shapes differ: {self.shape} and {other.shape}")
