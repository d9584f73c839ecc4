"""Rules that choose K entries of a weight: places, rising, counted row by row, int64 (K,)."""

import torch
from torch import Tensor

from finespun.contract.site import SiteShape
from finespun.errors import InputError
from finespun.linalg import streams


def random(shape: SiteShape, count: int, seed: int) -> Tensor:
    """Uniformly, by seed and site."""
    key = streams.key(seed, shape.name, "mask")
    return streams.choice(key, shape.out_features * shape.in_features, count).sort().values


def structured(shape: SiteShape, lines: int, seed: int) -> Tensor:
    """The diagonal and `lines` evenly spaced rows (columns where out > in), the first of them by
    seed and site: as high a rank as the diagonal is long."""
    short, long = sorted((shape.out_features, shape.in_features))
    gap = short // lines
    first = int(streams.integers(streams.key(seed, shape.name, "mask"), 1, gap))
    mask = torch.eye(short, long, dtype=torch.bool)
    mask[first : first + lines * gap : gap] = True
    upright = mask if shape.out_features <= shape.in_features else mask.T
    return upright.flatten().nonzero()[:, 0]


def whole_lines(shape: SiteShape, count: int) -> int:
    """The lines, long side each, that `count` entries hold beside the diagonal."""
    short, long = sorted((shape.out_features, shape.in_features))
    return min(short, (count - short) // max(long - 1, 1))


def largest(scores: Tensor, count: int, skip: int = 0) -> Tensor:
    """Those that rank skip·count + 1 .. (skip + 1)·count by |scores|."""
    ranked = scores.detach().float().abs().flatten().topk((skip + 1) * count).indices
    return ranked[skip * count :].sort().values


def scored(scores: Tensor, count: int, shape: SiteShape) -> Tensor:
    """The K largest of |scores| (out, in), or the K entries of a boolean mask. Raises InputError
    for another shape, for NaN, and where fewer than K are not zero or a mask has not K."""
    wanted = (shape.out_features, shape.in_features)
    if tuple(scores.shape) != wanted:
        raise InputError(f"scores for {shape.name!r} are {tuple(scores.shape)}, expected {wanted}")
    if not torch.isfinite(scores).all():
        raise InputError(f"scores for {shape.name!r} are not all finite")
    found = int(scores.count_nonzero())
    if found < count or (scores.dtype == torch.bool and found != count):
        raise InputError(
            f"scores for {shape.name!r} have {found} entries that are not zero, for {count} to be "
            "chosen: see that the layer runs on these batches, or lower the rank"
        )
    return largest(scores, count)
