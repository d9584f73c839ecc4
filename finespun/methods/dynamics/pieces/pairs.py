"""Products of one shape together, and the pair of changes that follows a full gradient best.

P = s L R, L (m, k), R (k, n), G = ∂L/∂P never formed: gL = s G Rᵀ, gR = s Lᵀ G. A pair (hL, hR)
moves P by g̃ = s (L hR + hL R). ‖g̃ − G‖ is least for

    hR = (LᵀL)⁻¹ gR / s² + X R,   hL = (I − L (LᵀL)⁻¹ Lᵀ) gL (RRᵀ)⁻¹ / s² − L X,   X any (k, k);

all give g̃ = G − (I − P_L) G (I − P_R). Of them the pair nearest to (gL, gR), which is also the
smallest, has (LᵀL) X + X (RRᵀ) = −(LᵀL)⁻¹ gR Rᵀ / s².
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from finespun.contract import Delta
from finespun.contract.products import Product

Pair = tuple[Tensor, Tensor]
TINY = 1e-30


@dataclass
class Stack:
    """Products of one shape: L (b, m, k), R (b, k, n), their gradients, scale (b, 1, 1)."""

    products: list[Product]
    L: Tensor
    R: Tensor
    slope_left: Tensor
    slope_right: Tensor
    scale: Tensor

    def write(self, pair: Pair) -> None:
        """Let optimisers see other gradients."""
        for product, hL, hR in zip(self.products, *pair):
            left, right = product.gradients() or (hL, hR)
            left.copy_(hL)
            right.copy_(hR if product.gate is None else hR * inverse(product.gate)[:, None])


def stacked(deltas: Iterable[Delta]) -> list[Stack]:
    """The products of deltas by their shapes, those that have gradients, in float32 at least."""
    found: dict[object, list[tuple[Product, Pair]]] = {}
    for delta in deltas:
        for product in delta.products():
            gradients = product.gradients()
            if gradients is not None:
                key = product.L.shape, product.R.shape, product.L.dtype, product.L.device
                found.setdefault(key, []).append((product, gradients))
    return [_stack(members) for members in found.values()]


def _stack(members: list[tuple[Product, Pair]]) -> Stack:
    products = [product for product, _ in members]
    dtype = torch.promote_types(products[0].L.dtype, torch.float32)

    def many(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).to(dtype)

    own = [g[1] if p.gate is None else g[1] * inverse(p.gate)[:, None] for p, g in members]
    scale = torch.tensor([p.scale for p in products], dtype=dtype, device=products[0].L.device)
    L, R = many(p.L for p in products), many(p.R for p in products)
    return Stack(products, L, R, many(g[0] for _, g in members), many(own), scale[:, None, None])


def inverse(gate: Tensor) -> Tensor:
    """1 / g, and 0 for ranks whose gate is as good as shut."""
    shut = gate.abs() <= 1e-3 * gate.abs().max()
    return torch.where(shut, 0.0, 1.0 / torch.where(shut, 1.0, gate))


def gram(M: Tensor, damping: float, least: float = 0.0) -> Tensor:
    """M Mᵀ + (damping · trace / k + least) I of M (b, k, n); I where M is zero."""
    K = M @ M.mT
    mean = K.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = torch.where(mean == 0, 1.0, damping * mean + least)
    return K + ridge * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)


def nearest(
    stack: Stack, pair: Pair | None = None, damping: float = 1e-4, small: bool = True
) -> Pair:
    """(hL, hR) for gradients, those of the stack unless given; `small`: the smallest such pair,
    else X = 0. A side that is zero moves the other alone, by its own gradient."""
    L, R, s2 = stack.L, stack.R, stack.scale.square()
    gL, gR = (stack.slope_left, stack.slope_right) if pair is None else pair
    KL, KR = gram(L.mT, damping), gram(R, damping)
    hR = torch.linalg.solve(KL, gR) / s2
    y = torch.linalg.solve(KR, gL.mT).mT / s2
    hL = y - L @ torch.linalg.solve(KL, L.mT @ y)
    if small:
        X = sylvester(KL, KR, -hR @ R.mT)
        hL, hR = hL - L @ X, hR + X @ R
    return hL, hR


def sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """X of P X + X Q = C, P and Q symmetric and positive."""
    p, U = torch.linalg.eigh(P)
    q, V = torch.linalg.eigh(Q)
    return U @ ((U.mT @ C @ V) / (p[..., :, None] + q[..., None, :])) @ V.mT


def effect(stack: Stack, pair: Pair) -> Tensor:
    """g̃ = s (L hR + hL R), (b, m, n)."""
    return stack.scale * (stack.L @ pair[1] + pair[0] @ stack.R)


def effect_norm(stack: Stack, pair: Pair) -> Tensor:
    """‖g̃‖ of each, (b, 1, 1), nothing of size m x n formed."""
    left = torch.cat([stack.L, pair[0]], -1)
    right = torch.cat([pair[1], stack.R], -2)
    square = ((left.mT @ left) * (right @ right.mT)).sum((-2, -1), keepdim=True)
    return stack.scale.abs() * square.clamp_min(0).sqrt()


def norm(pair: Pair) -> Tensor:
    """The Euclidean norm of each pair, (b, 1, 1)."""
    return sum(t.square().sum((-2, -1), keepdim=True) for t in pair).sqrt()  # type: ignore[union-attr]


def resized(pair: Pair, size: Tensor) -> Pair:
    """The pair at another norm."""
    ratio = size / norm(pair).clamp_min(TINY)
    return pair[0] * ratio, pair[1] * ratio
