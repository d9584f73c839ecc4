"""Frozen random bases that multiply trained coefficients: kept, or drawn anew in every pass."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from finespun.linalg import streams
from finespun.methods.structures.pieces.frozen import Frozen, not_compiled


class Basis:
    """n frozen matrices of `size` parameters each, uniform on [-1, 1), as an (n, size) tensor that
    is kept (`chunk` 0) or drawn anew, `chunk` rows at a time, whenever it multiplies."""

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
