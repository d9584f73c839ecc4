"""The hot loop of every low-rank update: y = x Wᵀ + b + s·(x Aᵀ) Bᵀ, and its backward.

Each fast version stands beside a plain reference of the same signature. The fast one makes three
products and no temporary of the size of y; its backward makes five, of which one adds in place.
Plain tensors of one dtype only: `plain` says when it may be used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter


def plain(*tensors: Tensor) -> bool:
    """Whether the fast version may take these tensors: ordinary, of one floating dtype, outside
    autocast, torch.func transforms and compilation (the compiler fuses the reference itself)."""
    first = tensors[0]
    return (
        all(type(t) in (Tensor, Parameter) and t.dtype == first.dtype for t in tensors)
        and not torch.compiler.is_compiling()
        and (first.is_meta or not torch.is_autocast_enabled(first.device.type))
        and not torch._C._functorch.maybe_current_level()
    )


def low_rank_reference(x: Tensor, A: Tensor, B: Tensor, s: float, gain: Tensor | None) -> Tensor:
    """s·(x Aᵀ) Bᵀ for x (..., in), A (r, in), B (out, r), in the dtype of A.

    `gain` (scalar or (out,)) scales what reaches A and B in the backward pass, not x.
    """
    x = x.to(A.dtype)
    if gain is None:
        return F.linear(F.linear(x, A), B) * s
    value = F.linear(F.linear(x, A.detach()), B.detach())
    own = F.linear(F.linear(x.detach(), A), B) * gain
    return (value + (own - own.detach())) * s


def low_rank_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float,
    gain: Tensor | None = None,
    drop: float = 0.0,
) -> Tensor:
    """x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ: x (..., in), W (out, in), A (r, in), B (out, r) -> (..., out).

    Dropout keeps one byte a number for the backward pass, where the dropped x is rebuilt; its rate
    is rounded to 1/256 there and the rescaling follows the rounded rate.
    """
    multiply = low_rank_fused if plain(x, W, A, B) else low_rank_linear_reference
    return multiply(x, W, b, A, B, s, gain, drop)


def low_rank_fused(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float,
    gain: Tensor | None = None,
    drop: float = 0.0,
) -> Tensor:
    """The same for tensors that are `plain`: three products, one node of the graph."""
    mask, s = (None, s) if drop == 0.0 else _byte_mask(x, drop, s)
    return _LowRankLinear.apply(x, W, b, A, B, s, gain, mask)  # type: ignore[no-untyped-call]


def low_rank_linear_reference(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float,
    gain: Tensor | None = None,
    drop: float = 0.0,
) -> Tensor:
    """The same in plain PyTorch, for any dtypes and tensor types."""
    y = F.linear(x, W, b)
    dropped = F.dropout(x, drop) if drop else x
    return y + low_rank_reference(dropped, A, B, s, gain).to(y.dtype)


def _byte_mask(x: Tensor, drop: float, s: float) -> tuple[Tensor, float]:
    """Bytes like the rows of x, 1 with probability 1 − k/256 and else 0, and s / (1 − k/256).

    Bytes and not booleans: those become floats several times slower.
    """
    k = min(max(round(drop * 256), 1), 255)
    n = x.numel()
    words = torch.empty(-(-n // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = words.view(torch.uint8)[:n].view(-1, x.shape[-1]) >= k
    return kept.view(torch.uint8), s / (1 - k / 256)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        s: float,
        gain: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = (rows if mask is None else rows * mask.to(rows.dtype)) @ A.T
        y = F.linear(rows, W, b).addmm_(h, B.T, alpha=s)
        ctx.save_for_backward(x, h, W, A, B, gain, mask)
        ctx.s = s
        # no view: code after the layer may write into its output
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], W.shape[0]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, W, A, B, gain, mask = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # a second derivative is wanted: h must depend on x and A
            h = (rows if mask is None else rows * mask.to(rows.dtype)) @ A.T
        dy = dy.reshape(-1, dy.shape[-1])
        own = dy if gain is None else dy * gain
        need_x, need_W, need_b, need_A, need_B = ctx.needs_input_grad[:5]
        dx = dW = db = dA = dB = None
        dh = (own @ B).mul_(ctx.s) if need_A or (need_x and gain is None) else None
        if need_A and dh is not None:
            dA = dh.T @ (rows if mask is None else rows * mask.to(rows.dtype))
        if need_B:
            dB = (h.T @ own).mul_(ctx.s).T
        if need_x:
            through = dh if gain is None else (dy @ B).mul_(ctx.s)
            dx = dy @ W
            dx = (
                dx.addmm_(through, A)
                if mask is None
                else dx.addcmul_(through @ A, mask.to(A.dtype))
            )
            dx = dx.view(x.shape)
        if need_W:
            dW = dy.T @ rows
        if need_b:
            db = dy.sum(0)
        return dx, dW, db, dA, dB, None, None, None
