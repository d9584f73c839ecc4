"""What is bilinear in an update: products of two trained sides, for optimisers to see.

P = scale · L R  with L (m, k) and R (k, n).

LoRA and what is written like it has one, and P is the update: L = B (out, r), R = g ∘ A (r, in)
with the gate g (r,) where there is one, ΔW = scale · L R. Where an exact start is kept, a constant
is taken away: ΔW = scale · (L R − B0 (g ∘ A0)).

LSR has two, of scale 1: A = Σ_k A1_k ⊗ A2_k and B = Σ_k B1_k ⊗ B2_k, zero padding included, are
products after the rearrangement of Van Loan and Pitsianis (`kernels.kron.kron_rearrange`):

    R(A) = L R,  L = F1ᵀ (r1·p1, s),  R = F2 (s, r2·p2),  row k of F1 is vec(A1_k), of F2 vec(A2_k)
    R(B) = L R,  L (q1·r1, s),  R (s, q2·r2)

Between them stand gate, exact start and c, which are in neither: ΔW = c · (B diag(g) A − ..) of the
trimmed A and B, linear in each P.

Others have products below their update too, and ΔW is affine in each P (of DoRA, to first order:
its lengths are constants): the cells of MELoRA and GraLoRA; both sides of LoHa; B A of HiRA, DoRA
and Block-LoRA's input layout; vec(P) vec(Q)ᵀ of KronA, and of LoKr the sides that have factors.
Several products may view parts of one parameter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from finespun.contract.wrapping import Wrapped


@dataclass(frozen=True)
class Product:
    """P = scale · L R, L (m, k) and R (k, n), detached and as they are now, the gate in R.

    `left()` (m, k) and `right()` (k, n) are views of the parameters: what is written to them under
    `torch.no_grad()` is written to the parameters. `gate` (k,) is what R is multiplied by,
    R = gate ∘ right(), or None; then L and R are the very views.
    """

    L: Tensor
    R: Tensor
    scale: float
    left: Callable[[], Tensor]
    right: Callable[[], Tensor]
    gate: Tensor | None = None

    def sides(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters that the two sides are, or view."""
        return _owner(self.left()), _owner(self.right())

    def gradients(self) -> tuple[Tensor, Tensor] | None:
        """The gradients of left (m, k) and right (k, n), views of the parameters' `.grad`: what is
        written to them is what an optimiser sees. None where one has none."""
        found = []
        for view, owner in zip((self.left(), self.right()), self.sides()):
            if owner.grad is None:
                return None
            if owner.grad.stride() != owner.stride():
                owner.grad = torch.empty_like(owner).copy_(owner.grad)
            at = owner.grad.storage_offset() + view.storage_offset() - owner.storage_offset()
            found.append(owner.grad.as_strided(view.size(), view.stride(), at))
        return found[0], found[1]

    @classmethod
    def of(
        cls,
        left: Callable[[], Tensor],
        right: Callable[[], Tensor],
        scale: float = 1.0,
        gate: Tensor | None = None,
    ) -> "Product":
        """The product of what two callables view."""
        L, R = left().detach(), right().detach()
        gate = None if gate is None else gate.detach()
        return cls(L, R if gate is None else gate[:, None] * R, scale, left, right, gate)


def products_of(delta: Wrapped) -> list[Product]:
    """The product of an update whose `low_rank` gives two parameters of its own, or views of two;
    [] for all others (computed, frozen or shared sides, none) and for a dead update."""
    pair = delta.low_rank()
    if pair is None or delta.dead:
        return []
    down, up = (_parameter(delta, side) for side in pair)
    if down is None or up is None or down is up:
        return []

    def side(which: int) -> Tensor:
        return delta.low_rank()[which]  # type: ignore[index]

    return [Product.of(lambda: side(1), lambda: side(0), delta.scale, delta.gating)]


def _owner(view: Tensor) -> nn.Parameter:
    """The parameter that a side is, or views."""
    return cast(nn.Parameter, view if view._base is None else view._base)


def _parameter(delta: Wrapped, side: Tensor) -> nn.Parameter | None:
    """The delta's own parameter that is, or is viewed by, a side."""
    own = delta.trained_parameters()
    return next((p for p in own if side is p or side._base is p), None)


def cells(
    left: Callable[[int], Tensor],
    right: Callable[[int], Tensor],
    gates: Sequence[Tensor | None],
    scale: float,
) -> list[Product]:
    """A product for each gate, of views that know which of them they are."""
    return [
        Product.of(partial(left, i), partial(right, i), scale, gate) for i, gate in enumerate(gates)
    ]


def why_none(delta: Wrapped) -> str:
    """Why an update has no products."""
    bank = delta.bank
    if bank is not None and any(p.requires_grad for p in bank.parameters()):
        return "it trains tensors that other layers share"
    if len(list(delta.trained_parameters())) < 2:
        return "it trains one tensor, of which it is linear, or none"
    if delta.gating is not None:
        return "its gate stands inside of what would be a product"
    return "no two tensors that it trains are by themselves the sides of a product"
