"""Heads and channels that the layers of a block share: which they are, and what they weigh."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finespun.contract.site import Coupling, Site, SiteShape
from finespun.contract.structure import Scores
from finespun.errors import InputError, nearest

Members = list[tuple[Site, Coupling]]


def blocks_of(sites: Iterable[Site], coupling: Callable[[Site], Coupling]) -> dict[str, Members]:
    """Block -> the sites that share its units, by name, in whatever order the sites come. Units are
    taken apart where all the sites of a block have the same pieces of them (query heads)."""
    found: dict[str, Members] = {}
    for site in sites:
        own = coupling(site)
        found.setdefault(own.name, []).append((site, own))
    return {name: _finest(found[name]) for name in sorted(found)}


def split(taken: Tensor, blocks: Mapping[str, Members]) -> dict[str, list[int]]:
    """Parameters of units, counted through all the blocks, as each block's own, rising."""
    sizes = [members[0][1].units for members in blocks.values()]
    mask = torch.zeros(sum(sizes), dtype=torch.bool)
    mask[taken] = True
    return {n: m.nonzero()[:, 0].tolist() for n, m in zip(blocks, mask.split(sizes))}


def importance(members: Members, values: Sequence[Callable[[Site], Tensor]]) -> Tensor:
    """√ Σ over the sites of a block of Π over the measures of ‖·‖² of each unit, (units,).

    A measure of a site is like its weight (out, in), or holds a number for each feature or unit; on
    the meta device it counts as zero. Raises InputError for other shapes.
    """
    total = torch.zeros(members[0][1].units, dtype=torch.float64)
    for site, coupling in members:
        parts = [_squares(measure(site), site.shape, coupling) for measure in values]
        total += torch.stack(parts).prod(0)
    return total.sqrt()


def given(scores: Scores, site: Site) -> Tensor:
    """The scores of one site. Raises InputError where they are no tensor of finite numbers."""
    name = site.shape.name
    found = scores.get(name)
    if isinstance(found, Tensor):
        if not found.is_meta and not torch.isfinite(found).all():
            raise InputError(f"scores for {name!r} are not all finite")
        return found
    raise InputError(
        f"{name!r} needs scores of its features or entries, a tensor, not {found!r}; "
        f"{nearest(name, scores)}"
    )


def lines(units: Sequence[int], of: int, size: int) -> Tensor:
    """Places (s,) of the features of units, out of `size` features in `of` units. Raises InputError
    unless they are some of them, rising."""
    if of < 1 or size % of or not units or sorted({*units, -1, of}) != [-1, *units, of]:
        raise InputError(f"units {units} of {of} are not rising ones of {size} features")
    width = size // of
    return (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten()


def _finest(members: Members) -> Members:
    parts = {c.parts for _, c in members}
    if len(parts) > 1:
        return members
    return [(site, replace(c, units=c.units * c.parts, parts=1)) for site, c in members]


def _squares(value: Tensor, shape: SiteShape, c: Coupling) -> Tensor:
    """Sums of squares over the units, (units,) in float64."""
    size = shape.out_features if c.side == "out" else shape.in_features
    if value.is_meta:
        return torch.zeros(c.units, dtype=torch.float64)
    if value.shape == (shape.out_features, shape.in_features):
        dtype = torch.promote_types(value.dtype, torch.float32)
        dim = 1 if c.side == "out" else 0
        value = torch.linalg.vector_norm(value.detach(), dim=dim, dtype=dtype)
    if value.shape not in ((size,), (c.units,)):
        raise InputError(
            f"scores for {shape.name!r} are {tuple(value.shape)}, expected "
            f"({shape.out_features}, {shape.in_features}), ({size},) or ({c.units},)"
        )
    return value.detach().double().cpu().view(c.units, -1).square().sum(1)
