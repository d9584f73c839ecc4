"""Singular values of a matrix that can only be multiplied by (Halko, Martinsson, Tropp, 2011)."""

from collections.abc import Callable

import torch
from torch import Tensor

from finespun.errors import InputError

from . import streams
from .lowrank import SVD, LowRank


def randomized_svd(
    apply: Callable[[Tensor], Tensor],
    apply_t: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    rank: int,
    oversample: int = 10,
    power: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SVD:
    """The `rank` largest singular values and vectors of M (out, in), seen only through products.

    apply(X) = M·X for X (in, k), apply_t(Y) = Mᵀ·Y for Y (out, k), k = rank + oversample, both in
    `dtype` (float32 or float64) on `device`. Each is called 1 + power times, with a QR between.
    With two power steps the error is within a percent of the best even on slow spectra; with none
    it can be half as much again. The probes are `streams.normal`, hence the same everywhere.
    Raises InputError when rank is not 1..min(shape), or oversample or power is negative.
    """
    out, inner = shape
    if not 1 <= rank <= min(shape):
        near = min(max(rank, 1), min(shape))
        raise InputError(
            f"rank must be 1..{min(shape)} for {out} x {inner}, got {rank}; try {near}"
        )
    if oversample < 0 or power < 0:
        raise InputError(f"oversample={oversample} and power={power} must not be negative")
    width = min(rank + oversample, out, inner)
    probes = streams.normal(streams.key(seed, "randomized_svd", "probes"), (inner, width))
    basis, _ = torch.linalg.qr(apply(probes.to(device=device, dtype=dtype)))
    for _ in range(power):
        rows, _ = torch.linalg.qr(apply_t(basis))
        basis, _ = torch.linalg.qr(apply(rows))
    V, S, Uh = torch.linalg.svd(apply_t(basis), full_matrices=False)
    return SVD(basis @ Uh.mT[:, :rank], S[:rank], V[:, :rank].mT)


def randomized_svd_of(
    M: Tensor | LowRank, rank: int, oversample: int = 10, power: int = 2, seed: int = 0
) -> SVD:
    """`randomized_svd` of a matrix at hand; half precision is computed in float32."""
    held = M if isinstance(M, Tensor) else M.A
    dtype = torch.float64 if held.dtype == torch.float64 else torch.float32

    def cast(T: Tensor | LowRank) -> Tensor | LowRank:
        return T.to(dtype) if isinstance(T, Tensor) else LowRank(T.A.to(dtype), T.B.to(dtype))

    whole, turned = cast(M), cast(M.T)
    return randomized_svd(
        lambda X: whole @ X,
        lambda Y: turned @ Y,
        (M.shape[0], M.shape[1]),
        rank,
        oversample,
        power,
        seed,
        dtype,
        held.device,
    )
