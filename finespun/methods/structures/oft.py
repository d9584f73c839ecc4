"""OFT: the inputs of a layer are rotated, block by block (arXiv 2306.07280, 2506.19847)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Base, Delta
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Structure,
    must_divide,
    register,
)
from finespun.errors import InputError


@register
@dataclass(frozen=True, kw_only=True)
class OFT(Structure):
    """W = W0·Rᵀ, R = diag(R_1 .. R_n), R_i = (I + S_i)(I − S_i)⁻¹ with S_i skew, b x b, n = in/b.

    Good for: turning a layer's inputs while norms and angles of its rows stay.
    Not for: LoRA servers: the update has full rank, an export is approximate.

    R is a rotation: norms of rows of W0 and angles between them stay. s (n, b(b−1)/2) are the
    entries of S_i above the diagonal, zero at the start: in·(b−1)/2 parameters; the update has full
    rank. `neumann` terms of the power series replace the exact inverse (the library's default is 5;
    then R is only nearly a rotation); 0 solves exactly. b = `block_size` must divide in.
    Source: arXiv 2306.07280; rotated inputs and the series: arXiv 2506.19847.
    """

    block_size: int = 32
    neumann: int = 0

    kind = "oft"
    source = "arXiv 2306.07280"
    aliases = {"oft_block_size": "block_size", "num_cayley_neumann_terms": "neumann"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise InputError(f"block_size={self.block_size} cannot rotate; try 32")
        if self.neumann < 0 or self.neumann in (1, 2):
            raise InputError(f"neumann={self.neumann} must be 0 (exact) or at least 3; try 5")

    def choose(self, site: Site) -> dict[str, int]:
        must_divide("block_size", self.block_size, site.shape, sides=["in"])
        return {"block_size": self.block_size}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "OFTDelta":
        return OFTDelta(site, plan.choices[site.shape.name]["block_size"], self.neumann)

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return shape.in_features * (choice.get("block_size", self.block_size) - 1) // 2

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """Rotating x; and the rotations once."""
        n, b = shape.in_features, choice.get("block_size", self.block_size)
        return 2 * tokens * n * b + cayley_flops(n // b, b, self.neumann)


class OFTDelta(Delta):
    """s (n, b(b−1)/2), row by row the entries of the S_i above the diagonal."""

    def __init__(self, site: Site, block: int, neumann: int) -> None:
        super().__init__(site)
        self.block, self.neumann = block, neumann
        count = site.shape.in_features // block
        self.s = nn.Parameter(torch.zeros(count, block * (block - 1) // 2, device=site.device))

    def skew(self) -> Tensor:
        """S_i, (n, b, b)."""
        n, b = len(self.s), self.block
        rows, columns = torch.triu_indices(b, b, 1, device=self.s.device)
        flat = torch.zeros(n, b * b, dtype=self.s.dtype, device=self.s.device)
        above = flat.index_copy(1, rows * b + columns, self.s).view(n, b, b)
        return above - above.mT

    def turn(self) -> Tensor:
        """R_i − I, (n, b, b)."""
        return cayley(self.skew(), self.neumann)

    def delta(self, w0: Tensor) -> Tensor:
        return multiply_blocks(w0, self.turn().mT)

    def through(self, x: Tensor, base: Base) -> Tensor:
        return base(x + multiply_blocks(x.to(self.s.dtype), self.turn()).to(x.dtype))


def cayley(S: Tensor, neumann: int = 0) -> Tensor:
    """(I + S)(I − S)⁻¹ − I = 2 S (I − S)⁻¹ for skew S (..., b, b), exactly zero at zero.

    With `neumann` N: (I + S)(I + S + .. + S^(N−2)) − I, N terms.
    """
    if not neumann:
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        return torch.linalg.solve(eye - S, 2 * S)
    power, total = S, 2 * S
    for _ in range(neumann - 3):
        power = power @ S
        total = total + 2 * power
    return total + power @ S


def cayley_flops(count: int, b: int, neumann: int = 0) -> int:
    """Operations of `cayley` for `count` blocks: LU and b right sides, or the products."""
    return count * (2 * b**3 * max(neumann - 2, 0) if neumann else 8 * b**3 // 3)


def multiply_blocks(x: Tensor, T: Tensor) -> Tensor:
    """x (..., n·b) times diag(T_1 .. T_n), T (n, b, b)."""
    return torch.einsum("...nb,nbc->...nc", x.unflatten(-1, T.shape[:2]), T).flatten(-2)
