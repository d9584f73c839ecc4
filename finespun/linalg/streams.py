"""Random numbers that are the same on every machine, so that seeds are stored instead of tensors.

A stream belongs to (seed, site name, purpose) through `key`. Element t of a stream depends on the
key and on t alone: not on how many are asked for at once, on threads, device or dtype. Each
sampler reads the words of its key from the start, so two samplers need two purposes.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", 2011) in int64 arithmetic on the CPU, where a product of two 32-bit words wraps to the
same 64 bits as its unsigned value. Everything above it uses integers, exact powers of two, and a
table made of correctly rounded operations.
"""

import hashlib
import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finespun.errors import InputError

Key = tuple[int, int]

_LOW = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 1 << 14  # blocks worked on at once: small enough to stay in cache
_CELLS = 1 << 16


def key(seed: int, site: str, purpose: str) -> Key:
    """The key of a stream: 64 bits of BLAKE2b over the seed, the site's name and the purpose."""
    parts = [str(int(seed)).encode(), site.encode(), purpose.encode()]
    text = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: Sequence[Tensor], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of counter (int64 tensors of 32-bit values) -> four random words.

    Ten rounds of (c0, c1, c2, c3) -> (hi(M1·c2)^c1^k0, lo(M1·c2), hi(M0·c0)^c3^k1, lo(M0·c0)), the
    key raised by the Weyl constants between rounds.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        even, odd = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0 = (odd >> 32).bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (even >> 32).bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = odd.bitwise_and_(_LOW), even.bitwise_and_(_LOW)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _check_count(n: int, offset: int) -> None:
    if n < 0 or offset < 0:
        raise InputError(f"count and offset must not be negative, got n={n}, offset={offset}")


def bits(key: Key, n: int, offset: int = 0) -> Tensor:
    """Words offset .. offset+n of the stream: uniform 0..2³²−1 in an int64 tensor (n,).

    Word t is word t mod 4 of the block whose counter is t div 4. Raises InputError when negative.
    """
    _check_count(n, offset)
    first, last = offset // 4, -(-(offset + n) // 4)
    words = torch.empty(max(last - first, 0), 4, dtype=torch.int64, device="cpu")
    for start in range(first, last, _CHUNK):
        block = torch.arange(start, min(start + _CHUNK, last), dtype=torch.int64, device="cpu")
        zero = torch.zeros_like(block)
        out = philox((block & _LOW, block >> 32, zero, zero), key)
        torch.stack(out, dim=1, out=words[start - first : start - first + len(block)])
    return words.view(-1)[offset - 4 * first :][:n]


def integers(key: Key, n: int, high: int, offset: int = 0) -> Tensor:
    """Integers uniform on 0..high−1, int64 (n,): ⌊U·high / 2⁶⁴⌋ of 64-bit U (words 2t, 2t+1).

    No value is likelier than another by more than high/2⁶⁴ of its probability.
    Raises InputError unless 1 <= high <= 2³¹.
    """
    if not 1 <= high <= 1 << 31:
        raise InputError(f"high must be 1..2**31, got {high}")
    pair = bits(key, 2 * n, 2 * offset).view(n, 2)
    return (pair[:, 0] * high + (pair[:, 1] * high >> 32)) >> 32


def uniform(
    key: Key, shape: Sequence[int], offset: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Numbers uniform on [0, 1), multiples of 2⁻²⁴: the upper 24 bits of a word, exact in float32.

    Element t of the tensor, row by row, is element offset + t of the stream. Other dtypes are
    rounded from float32.
    """
    words = bits(key, math.prod(shape), offset) >> 8
    return (words.float() * 2.0**-24).to(dtype).view(tuple(shape))


def signs(
    key: Key, shape: Sequence[int], offset: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Fair signs, +1 or −1: −1 where bit t mod 32 (lowest first) of word t div 32 is set."""
    n = math.prod(shape)
    _check_count(n, offset)
    first = offset // 32
    words = bits(key, -(-(offset + n) // 32) - first, first)
    each = (words[:, None] >> torch.arange(32, device="cpu")) & 1
    picked = each.view(-1)[offset - 32 * first :][:n]
    return (1 - 2 * picked).to(dtype).view(tuple(shape))


def normal(
    key: Key, shape: Sequence[int], offset: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers from a table of 65,536 equally likely values.

    Number t is entry (half-word t mod 2, lower first, of word t div 2) of the inverse distribution
    function at (i + ½)/65536, scaled to variance 1. Against the true law: mean 0 and skewness 0 by
    symmetry, variance 1 − 6e-10, kurtosis 2.9992 for 3, sixth moment 14.97 for 15, largest value
    4.325. Other dtypes are rounded from float32.
    """
    n = math.prod(shape)
    _check_count(n, offset)
    first = offset // 2
    words = bits(key, -(-(offset + n) // 2) - first, first)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=1).view(-1)
    table = normal_table().to(dtype)
    return table[halves[offset - 2 * first :][:n]].view(tuple(shape))


def permutation(key: Key, n: int) -> Tensor:
    """A random order of 0..n−1, int64 (n,): the order of 63-bit random numbers, ties by index."""
    _check_count(n, 0)
    pair = bits(key, 2 * n).view(n, 2)
    return torch.argsort((pair[:, 0] << 31) | (pair[:, 1] >> 1), stable=True)


def choice(key: Key, n: int, k: int) -> Tensor:
    """k distinct integers of 0..n−1 in random order, int64 (k,).

    Up to half of them: the first k different values of `integers(key, ·, n)`, so a smaller choice
    is the start of a larger one; above: the start of `permutation(key, n)`.
    Raises InputError unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise InputError(f"cannot choose {k} different ones of {n}; nearest: {min(max(k, 0), n)}")
    if k == 0 or 2 * k > n:
        return permutation(key, n)[:k]
    drawn = math.ceil(-n * math.log1p(-k / n) + 6 * math.sqrt(k)) + 8
    while True:
        values, order = torch.sort(integers(key, drawn, n), stable=True)
        fresh = torch.ones_like(values, dtype=torch.bool)
        fresh[1:] = values[1:] != values[:-1]
        when, which = torch.sort(order[fresh])
        if len(when) >= k:
            return values[fresh][which[:k]]
        drawn *= 2


# Wichura, "Algorithm AS 241: the percentage points of the normal distribution", 1988.
_MIDDLE = (
    (
        2.50908_09287_30122_6727e3,
        3.34305_75583_58812_8105e4,
        6.72657_70927_00870_0853e4,
        4.59219_53931_54987_1457e4,
        1.37316_93765_50946_1125e4,
        1.97159_09503_06551_4427e3,
        1.33141_66789_17843_7745e2,
        3.38713_28727_96366_6080e0,
    ),
    (
        5.22649_52788_52854_5610e3,
        2.87290_85735_72194_2674e4,
        3.93078_95800_09271_0610e4,
        2.12137_94301_58659_5867e4,
        5.39419_60214_24751_1077e3,
        6.87187_00749_20579_0830e2,
        4.23133_30701_60091_1252e1,
        1.0,
    ),
)
_SHOULDER = (
    (
        7.74545_01427_83414_07640e-4,
        2.27238_44989_26918_45833e-2,
        2.41780_72517_74506_11770e-1,
        1.27045_82524_52368_38258e0,
        3.64784_83247_63204_60504e0,
        5.76949_72214_60691_40550e0,
        4.63033_78461_56545_29590e0,
        1.42343_71107_49683_57734e0,
    ),
    (
        1.05075_00716_44416_84324e-9,
        5.47593_80849_95344_94600e-4,
        1.51986_66563_61645_71966e-2,
        1.48103_97642_74800_74590e-1,
        6.89767_33498_51000_04550e-1,
        1.67638_48301_83803_84940e0,
        2.05319_16266_37758_82187e0,
        1.0,
    ),
)


def _rational(coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: float) -> float:
    top = bottom = 0.0
    for upper, lower in zip(*coefficients):
        top, bottom = top * r + upper, bottom * r + lower
    return top / bottom


def _upper_quantile(cell: int) -> float:
    """Inverse normal distribution at (cell + ½)/65536 for a cell of the upper half."""
    q = (cell + 0.5) / _CELLS - 0.5
    if q <= 0.425:
        return q * _rational(_MIDDLE, 0.180625 - q * q)
    r = math.sqrt(-Decimal(0.5 - q).ln())
    return _rational(_SHOULDER, r - 1.6)


@lru_cache(maxsize=1)
def _table() -> NDArray[np.float32]:
    with localcontext() as context:
        context.prec = 28
        upper = [_upper_quantile(cell) for cell in range(_CELLS // 2, _CELLS)]
    spread = math.sqrt(math.fsum(x * x for x in upper) / len(upper))
    half = np.array([x / spread for x in upper]).astype(np.float32)
    return np.concatenate([-half[::-1], half])


def normal_table() -> Tensor:
    """The 65,536 values of `normal`, rising, float32, antisymmetric and of mean square 1.

    Computed with + − × ÷, square roots and decimal logarithms, all correctly rounded on every
    machine, then scaled by an exactly rounded sum and rounded to float32. A fresh copy each time.
    """
    return torch.from_numpy(_table().copy())
