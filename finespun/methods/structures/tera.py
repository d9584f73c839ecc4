"""TeRA: a frozen random tensor network between four trained vectors, of high rank (2509.03234)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    register,
)
from finespun.errors import PlanError
from finespun.kernels.kron import kron_apply, kron_macs, kron_sum
from finespun.linalg import choose_factors
from finespun.methods.structures.pieces.frozen import Frozen


@register
@dataclass(frozen=True, kw_only=True)
class TeRA(Ranked):
    """ΔW = c·(U1 D1 ⊗ U2 D2)·G·(U3 D3 ⊗ U4 D4)ᵀ,  D_n = diag(d_n), d_n (R,): 4·R parameters.

    Good for: a few dozen parameters a layer with rank up to R².
    Not for: fast steps: the frozen network costs more than a small LoRA.

    out ≤ I1·I2 and in ≤ I3·I4 are split evenly; U_n (I_n, R) of variance 1/R and G (R², R²) of
    variance 1 are frozen, normal, and shared by all layers of one shape. d1 starts at zero, the
    others at one. ΔW has rank up to R². `rank` is R, at most the least I_n; `ranks` gives each mode
    its own. c = alpha / √in, alpha 1 unless given. Source: arXiv 2509.03234 (the order of the
    network is ours: the paper's code is not public).
    """

    rank: int = 16
    ranks: tuple[int, int, int, int] | None = None

    kind = "tera"
    source = "arXiv 2509.03234"

    @property
    def modes(self) -> tuple[int, ...]:
        """R1, R2, R3, R4."""
        return (self.rank,) * 4 if self.ranks is None else self.ranks

    def choose(self, site: Site) -> dict[str, Any]:
        shape, sizes = site.shape, split(site.shape)
        for n, (R, I) in enumerate(zip(self.modes, sizes), start=1):
            if not 1 <= R <= I:
                raise PlanError(
                    f"R{n}={R} does not fit I{n}={I} of {shape.name!r} ({shape.out_features} = "
                    f"{sizes[0]}·{sizes[1]}, {shape.in_features} = {sizes[2]}·{sizes[3]}, rounded "
                    f"up); 1 to {I} do"
                )
        alpha = 1.0 if self.alpha is None else self.alpha
        scale = alpha / math.sqrt(shape.in_features)
        return {"modes": list(self.modes), "sizes": list(sizes), "scale": scale}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "TeRADelta":
        return TeRADelta(site, plan.choices[site.shape.name], self.seed)

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return sum(choice.get("modes", self.modes))

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """Mode by mode, each side in its cheaper order."""
        modes, sizes = choice.get("modes", self.modes), choice.get("sizes") or split(shape)
        return 2 * tokens * (both_sides(sizes, modes) + math.prod(modes))


def split(shape: SiteShape) -> tuple[int, int, int, int]:
    """I1, I2, I3, I4."""
    out, inner = (choose_factors(1, n).sizes for n in (shape.out_features, shape.in_features))
    return *out, *inner


def both_sides(sizes: Sequence[int], modes: Sequence[int]) -> int:
    """Multiply-adds a row for (U1 ⊗ U2) and (U3 ⊗ U4)ᵀ, each in the better order."""
    (I1, I2, I3, I4), (R1, R2, R3, R4) = sizes, modes
    return kron_macs(1, I1, I2, R1, R2) + kron_macs(1, R3, R4, I3, I4)


class TeRADelta(Delta):
    """d1, d2, d3, d4; U1 .. U4 and G are frozen and shared."""

    def __init__(self, site: Site, choice: Mapping[str, Any], seed: int) -> None:
        super().__init__(site)
        R, sizes, shape = choice["modes"], choice["sizes"], site.shape
        self.scale, owner = choice["scale"], f"{shape.out_features}x{shape.in_features}"
        if sizes[0] * sizes[1] < shape.out_features or sizes[2] * sizes[3] < shape.in_features:
            raise PlanError(f"sizes {sizes} of {shape.name!r} are less than its {owner}")
        self.U = [
            Frozen("normal", seed, (owner, f"tera U{n}"), (I, r))
            for n, (I, r) in enumerate(zip(sizes, R), start=1)
        ]
        self.G = Frozen("normal", seed, (owner, "tera G"), (R[0] * R[1], R[2] * R[3]))
        self.d1 = nn.Parameter(torch.zeros(R[0], device=site.device))
        self.d2, self.d3, self.d4 = (nn.Parameter(torch.ones(r, device=site.device)) for r in R[1:])

    def scaled(self) -> list[Tensor]:
        """U_n D_n / √R_n, each (1, I_n, R_n)."""
        vectors = (self.d1, self.d2, self.d3, self.d4)
        return [U.like(d)[None] * (d / math.sqrt(len(d))) for U, d in zip(self.U, vectors)]

    def low_rank(self) -> Factors:
        """Rank min(R1·R2, R3·R4): the core goes to the side with the larger one."""
        U1, U2, U3, U4 = self.scaled()
        shape, G = self.site.shape, self.G.like(self.d1)
        up = kron_sum(U1, U2)[: shape.out_features]
        down = kron_sum(U3, U4)[: shape.in_features].mT
        return (down, up @ G) if G.shape[0] >= G.shape[1] else (G @ down, up)

    def product(self, x: Tensor) -> Tensor:
        U1, U2, U3, U4 = self.scaled()
        shape, x = self.site.shape, x.to(U1.dtype)
        padding = U3.shape[1] * U4.shape[1] - shape.in_features
        h = kron_apply(U3.mT, U4.mT, F.pad(x, (0, padding)) if padding else x)
        y = kron_apply(U1, U2, F.linear(h, self.G.like(h)))
        return y[..., : shape.out_features] * self.scale

    def direct(self, tokens: int, formed: bool) -> bool:
        """Mode by mode unless that costs more than the factors and their forming do."""
        if self.adjusted:
            return False
        sizes, R = zip(*(U.shape for U in self.U))
        mine = both_sides(sizes, R) + math.prod(R)
        shape = self.site.shape
        factors = min(self.G.shape) * (shape.out_features + shape.in_features)
        side = shape.out_features if self.G.shape[0] >= self.G.shape[1] else shape.in_features
        return tokens * mine < math.prod(R) * side + tokens * factors
