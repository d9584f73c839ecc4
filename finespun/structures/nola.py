"""NOLA: LoRA's factors as mixtures of random matrices that a seed regenerates (2310.02556)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finespun.errors import InputError, PlanError
from finespun.linalg import streams
from finespun.structures.delta import Bank, Delta, Factors
from finespun.structures.frozen import Frozen, not_compiled
from finespun.structures.site import Site, SiteShape
from finespun.structures.structure import Plan, Ranked, register


@register
@dataclass(frozen=True, kw_only=True)
class NOLA(Ranked):
    """ΔW = c·B·A,  A = A0 + Σ_i α_i Ā_i (r, in),  B = Σ_j β_j B̄_j (out, r);  k + l numbers α, β.

    Good for: a count that depends neither on rank nor on the layer's size.
    Not for: fast steps: the factors are summed from k + l random matrices in each.

    A0 is frozen and drawn as LoRA's A; Ā and B̄ are frozen, uniform on ±1/√k and ±1/√l; α = β = 0
    at the start, where only β has a gradient. c = alpha / r with alpha = r. `l` is k unless given;
    `share_basis` lets all factors of one shape use one basis. The basis stays in memory,
    k·r·(in + out) numbers, unless `chunk` is set: then `chunk` matrices at a time are drawn anew in
    every pass, forward and backward, outside compiled graphs. Source: arXiv 2310.02556 (its code
    for language models).
    """

    k: int = 512
    l: int | None = None
    share_basis: bool = True
    chunk: int = 0

    kind = "nola"
    source = "arXiv 2310.02556"
    usual_scale = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or (self.l is not None and self.l < 1):
            raise InputError(f"k={self.k} and l={self.l} must be at least 1; try 512")
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
                    f"{shape.name!r} has numbers; at most {self.rank * width}"
                )
        return choice

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "NOLADelta":
        choice, shape = plan.choices[site.shape.name], site.shape
        rank: int = choice["rank"]
        A0 = Frozen("symmetric", self.seed, (shape.name, "nola A0"), (rank, shape.in_features))
        bases = []
        for side, n, width in zip("AB", self.terms, (shape.in_features, shape.out_features)):
            owner = f"{rank}x{width}" if self.share_basis else shape.name
            bases.append(
                Basis(self.seed, (owner, f"nola basis {side}"), n, rank * width, self.chunk)
            )
        return NOLADelta(site, A0, (bases[0], bases[1]), choice["scale"])

    def form(self, deltas: Sequence[Delta]) -> list[Factors]:
        nola = [d for d in deltas if isinstance(d, NOLADelta)]
        A, B = (mixed([d.mixture(side) for d in nola]) for side in (0, 1))
        return [d.complete_sides(a, b) for d, a, b in zip(nola, A, B)]

    def numbers(self, shape: SiteShape) -> int:
        return sum(self.terms)

    def flops(self, shape: SiteShape, tokens: int = 1) -> int:
        (k, l), n_in, n_out = self.terms, shape.in_features, shape.out_features
        return 2 * self.rank * (tokens * (n_in + n_out) + k * n_in + l * n_out)


class NOLADelta(Delta):
    """alpha (k,) and beta (l,); everything else comes from streams."""

    def __init__(
        self, site: Site, A0: Frozen, bases: tuple["Basis", "Basis"], scale: float
    ) -> None:
        super().__init__(site)
        self.scale, self.A0, self.bases = scale, A0, bases
        self.alpha = nn.Parameter(torch.zeros(bases[0].n, device=site.device))
        self.beta = nn.Parameter(torch.zeros(bases[1].n, device=site.device))

    def mixture(self, side: int) -> tuple["Basis", Tensor]:
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


class Basis:
    """n frozen matrices of `size` numbers each, uniform on [-1, 1), as an (n, size) tensor that is
    kept (`chunk` 0) or drawn anew, `chunk` rows at a time, whenever it multiplies."""

    def __init__(self, seed: int, stream: tuple[str, str], n: int, size: int, chunk: int) -> None:
        self.key = (seed, stream, n, size, chunk)
        self.n, self.size = n, size
        self.kept = None if chunk else Frozen("symmetric", seed, stream, (n, size))

    def parts(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the basis, `chunk` at a time."""
        seed, stream, n, size, chunk = self.key
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            drawn = streams.uniform(
                streams.key(seed, *stream), (rows.stop - start, size), offset=start * size
            )
            yield rows, (2 * drawn - 1).to(like.device, like.dtype)

    def mix(self, coefficients: Tensor) -> Tensor:
        """Coefficients (layers, n) -> flat factors (layers, size)."""
        if self.kept is not None:
            return coefficients @ self.kept.like(coefficients)
        mixture: Tensor = self._redraw(coefficients)
        return mixture

    def _redraw(self, coefficients: Tensor) -> Tensor:
        mixture: Tensor = _Mix.apply(coefficients, self)  # type: ignore[no-untyped-call]
        return mixture

    not_compiled(_redraw)


def mixed(wanted: Sequence[tuple[Basis, Tensor]]) -> list[Tensor]:
    """The mixture of every (basis, coefficients), with one product for each distinct basis."""
    groups: dict[object, list[int]] = {}
    for i, (basis, _) in enumerate(wanted):
        groups.setdefault(basis.key, []).append(i)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        coefficients = torch.stack([wanted[i][1] for i in members])
        found.update(zip(members, wanted[members[0]][0].mix(coefficients).unbind(0)))
    return [found[i] for i in range(len(wanted))]


class _Mix(torch.autograd.Function):
    """Coefficients times a basis of which nothing is kept between forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(coefficients: Tensor, basis: Basis) -> Tensor:
        total = coefficients.new_zeros(*coefficients.shape[:-1], basis.size)
        for rows, part in basis.parts(coefficients):
            total = total + coefficients[..., rows] @ part
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Basis], output: Tensor) -> None:
        ctx.basis = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Unmix.apply(grad, ctx.basis), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, basis: None) -> Tensor:
        moved: Tensor = _Mix.apply(tangent, ctx.basis)  # type: ignore[no-untyped-call]
        return moved


class _Unmix(torch.autograd.Function):
    """The transpose of `_Mix`: flat factors (layers, size) -> coefficients (layers, n)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(flat: Tensor, basis: Basis) -> Tensor:
        return torch.cat([flat @ part.mT for _, part in basis.parts(flat)], dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Basis], output: Tensor) -> None:
        ctx.basis = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Mix.apply(grad, ctx.basis), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, basis: None) -> Tensor:
        moved: Tensor = _Unmix.apply(tangent, ctx.basis)  # type: ignore[no-untyped-call]
        return moved
