"""MoRA: one square matrix between fixed ways in and out (arXiv 2405.12130)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta, Factors
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    must_be_one_of,
    register,
)
from finespun.errors import PlanError


@register
@dataclass(frozen=True, kw_only=True)
class MoRA(Ranked):
    """ΔW = c·decompress(M·compress(x));  M (r̂, r̂), r̂ = round √((in + out)·r);  r̂² parameters.

    Good for: memorising: a square matrix of high rank at LoRA's count.
    Not for: LoRA servers: its exact rank is large.

    Inputs are cut into blocks of r̂, the last one filled up with the first inputs. `sharing`
    "rotation" turns block t by the angles t·10000^(−2j/r̂) of rotary position embeddings, multiplies
    every block by M, and lays the results out one after the other, repeated or cut to fill the
    outputs: rank up to full; r̂ is rounded down to even. "sum" adds the blocks up and repeats M's
    product over the outputs: rank r̂. M starts at zero; c is 1 unless alpha is given, as in the
    paper. Source: arXiv 2405.12130, types 6 and 1 of its code.
    """

    sharing: Literal["rotation", "sum"] = "rotation"

    default_scale = 1.0

    kind = "mora"
    source = "arXiv 2405.12130"

    def __post_init__(self) -> None:
        super().__post_init__()
        must_be_one_of("sharing", self.sharing, ("rotation", "sum"))

    def size(self, shape: SiteShape) -> int:
        """r̂."""
        size = math.floor(math.sqrt((shape.in_features + shape.out_features) * self.rank) + 0.5)
        return size - size % 2 if self.sharing == "rotation" else size

    def choose(self, site: Site) -> dict[str, Any]:
        shape, size = site.shape, self.size(site.shape)
        limit = min(shape.in_features, shape.out_features)
        if not 1 <= size <= limit:
            fits = limit**2 // (shape.in_features + shape.out_features)
            raise PlanError(
                f"rank={self.rank} gives a matrix of {size} beyond what {shape.name!r} "
                f"({shape.out_features}x{shape.in_features}) can hold; try rank={max(fits, 1)}"
            )
        return {**super().choose(site), "size": size}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "MoRADelta":
        choice = plan.choices[site.shape.name]
        cls = RotatedMoRA if self.sharing == "rotation" else SummedMoRA
        return cls(site, choice["size"], choice["scale"])

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return int(choice.get("size", self.size(shape))) ** 2

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """A product with M for each block, three operations per input for the rotations; or sums
        and a single product."""
        size, inner = choice.get("size", self.size(shape)), shape.in_features
        if self.sharing == "sum":
            return int(tokens * (inner + 2 * size**2))
        return int(tokens * -(-inner // size) * (3 * size + 2 * size**2))


class MoRADelta(Delta):
    """M (r̂, r̂)."""

    def __init__(self, site: Site, size: int, scale: float) -> None:
        super().__init__(site)
        self.scale = scale
        self.M = nn.Parameter(torch.zeros(size, size, device=site.device))

    def blocks(self, x: Tensor) -> Tensor:
        """x (..., in) as blocks (..., n, r̂)."""
        size = len(self.M)
        return torch.cat([x, x[..., : -x.shape[-1] % size]], dim=-1).unflatten(-1, (-1, size))

    def spread(self, y: Tensor) -> Tensor:
        """Repeat y (..., any) over the outputs: (..., out)."""
        out = self.site.shape.out_features
        return y.repeat(*[1] * (y.dim() - 1), -(-out // y.shape[-1]))[..., :out]


class SummedMoRA(MoRADelta):
    """Blocks of inputs are added up: exact factors of rank r̂."""

    def low_rank(self) -> Factors:
        eye = torch.eye(len(self.M), dtype=self.M.dtype, device=self.M.device)
        count = torch.eye(self.site.shape.in_features, dtype=eye.dtype, device=eye.device)
        return self.M @ self.blocks(count).sum(-2).T, self.spread(eye).T

    def product(self, x: Tensor) -> Tensor:
        y = F.linear(self.blocks(x.to(self.M.dtype)).sum(-2), self.M)
        return self.spread(y) * self.scale


class RotatedMoRA(MoRADelta):
    """Blocks of inputs are turned and multiplied one by one."""

    reads_base = False

    def turned(self, x: Tensor) -> Tensor:
        """The blocks of x (..., in), block t turned: (..., n, r̂)."""
        half, blocks = len(self.M) // 2, self.blocks(x)
        j = torch.arange(half, dtype=x.dtype, device=x.device)
        t = torch.arange(blocks.shape[-2], dtype=x.dtype, device=x.device)
        angle = t[:, None] * 10_000 ** (-j / half)
        a, b = blocks[..., :half], blocks[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def delta(self, w0: Tensor) -> Tensor:
        eye = torch.eye(w0.shape[1], dtype=self.M.dtype, device=self.M.device)
        return self.product(eye).T

    def product(self, x: Tensor) -> Tensor:
        blocks = self.turned(x.to(self.M.dtype))
        return self.spread(F.linear(blocks, self.M).flatten(-2)) * self.scale
