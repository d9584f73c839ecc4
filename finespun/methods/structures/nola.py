"""NOLA: LoRA's factors as mixtures of random matrices that a seed regenerates (2310.02556)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta, Factors
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    must_be_positive,
    register,
)
from finespun.errors import InputError, PlanError
from finespun.methods.structures.pieces.basis import Basis, mixed
from finespun.methods.structures.pieces.frozen import Frozen


@register
@dataclass(frozen=True, kw_only=True)
class NOLA(Ranked):
    """ΔW = c·B·A,  A = A0 + Σ_i α_i Ā_i (r, in),  B = Σ_j β_j B̄_j (out, r);  k + l parameters α, β.

    Good for: a count that depends neither on rank nor on the layer's size.
    Not for: fast steps: the factors are summed from k + l random matrices in each.

    A0 is frozen and drawn as LoRA's A; Ā and B̄ are frozen, uniform on ±1/√k and ±1/√l; α = β = 0
    at the start, where only β has a gradient. c = alpha / r with alpha = r. `l` is k unless given;
    `share_basis` lets all factors of one shape use one basis. The basis stays in memory,
    k·r·(in + out) parameters, unless `chunk` is set: then `chunk` matrices at a time are drawn anew
    in every pass, forward and backward, outside compiled graphs. Source: arXiv 2310.02556 (its code
    for language models).
    """

    k: int = 512
    l: int | None = None
    share_basis: bool = True
    chunk: int = 0

    kind = "nola"
    sizes = ("k", "l")
    source = "arXiv 2310.02556"
    default_scale = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        must_be_positive(k=(self.k, 512), l=(self.l, 512))
        if self.chunk < 0:
            raise InputError(
                f"chunk={self.chunk} must not be negative; 0 keeps the basis in memory"
            )

    @property
    def terms(self) -> tuple[int, int]:
        """(k, l)."""
        return self.k, self.k if self.l is None else self.l

    def choose(self, site: Site) -> dict[str, Any]:
        choice, shape = super().choose(site), site.shape
        for name, n, width in zip("kl", self.terms, (shape.in_features, shape.out_features)):
            if n > self.rank * width:
                raise PlanError(
                    f"{name}={n} matrices are more than the {self.rank}x{width} factor of "
                    f"{shape.name!r} has parameters; at most {self.rank * width}"
                )
        return choice

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "NOLADelta":
        choice, shape = plan.choices[site.shape.name], site.shape
        rank: int = choice["rank"]
        A0 = Frozen("symmetric", self.seed, (shape.name, "nola A0"), (rank, shape.in_features))
        bases = []
        for side, n, width in zip("AB", self.terms, (shape.in_features, shape.out_features)):
            stream = f"{rank}x{width}" if self.share_basis else shape.name, f"nola basis {side}"
            bases.append(Basis(self.seed, stream, n, rank * width, self.chunk))
        return NOLADelta(site, A0, bases, choice["scale"])

    def form(self, deltas: Sequence[Delta]) -> list[Factors]:
        nola = [d for d in deltas if isinstance(d, NOLADelta)]
        A, B = (mixed([d.mixture(side) for d in nola]) for side in (0, 1))
        return [d.complete_sides(a, b) for d, a, b in zip(nola, A, B)]

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return sum(self.terms)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        (k, l), n_in, n_out = self.terms, shape.in_features, shape.out_features
        return 2 * self.rank_of(choice) * (tokens * (n_in + n_out) + k * n_in + l * n_out)


class NOLADelta(Delta):
    """alpha (k,) and beta (l,); everything else comes from streams."""

    def __init__(self, site: Site, A0: Frozen, bases: Sequence[Basis], scale: float) -> None:
        super().__init__(site)
        self.scale, self.A0, self.bases = scale, A0, bases
        self.alpha = nn.Parameter(torch.zeros(bases[0].n, device=site.device))
        self.beta = nn.Parameter(torch.zeros(bases[1].n, device=site.device))

    def mixture(self, side: int) -> tuple[Basis, Tensor]:
        """The basis of A (side 0) or B (side 1) and its coefficients."""
        return self.bases[side], (self.alpha, self.beta)[side] / math.sqrt(self.bases[side].n)

    def complete_sides(self, A: Tensor, B: Tensor) -> Factors:
        """A (r, in) and B (out, r) from their flat mixtures."""
        shape = self.site.shape
        start = self.A0.like(A) / math.sqrt(shape.in_features)
        return A.view(start.shape) + start, B.view(shape.out_features, len(start))

    def low_rank(self) -> Factors:
        A, B = (mixed([self.mixture(side)])[0] for side in (0, 1))
        return self.complete_sides(A, B)
