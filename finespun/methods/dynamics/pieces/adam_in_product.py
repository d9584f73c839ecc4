"""Adam in the space of the products, pulled back to their sides."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract import Delta
from finespun.contract.products import Product
from finespun.methods.dynamics.pieces.apart import Apart, Groups
from finespun.methods.dynamics.pieces.pairs import (
    Pair,
    Stack,
    effect,
    inverse,
    nearest,
    norm,
    stacked,
)


class ProductAdamW(Apart):
    """u = Adam(s (L hR + hL R));  (hL, hR) nearest to (s u Rᵀ, s Lᵀ u);  L, R −= lr (hL, hR).

    The gradients that it finds are a pair of the direction of h and of the norm of g̃. Weight decay
    shrinks the product: each side by √(1 − lr · decay). Moments lie in the state of the left
    side's parameter, those of several products that view it by the places of the views: `first`
    (m, n), `second` (m, n), or `rows` (m,) and `columns` (n,) where factored. All other parameters
    are AdamW's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        deltas: Sequence[Delta],
        damping: float,
        factored: bool,
    ) -> None:
        super().__init__(groups, lr)
        self.deltas, self.damping, self.factored = deltas, damping, factored

    def move(self, groups: Groups) -> Iterable[nn.Parameter]:
        for stack in stacked(self.deltas):
            pair = stack.slope_left, stack.slope_right
            change = effect(stack, pair)
            change *= norm(pair) / change.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
            owners = [product.sides() for product in stack.products]
            wanted = torch.stack(
                [
                    self._adam(self._moments(product, left), g, groups[left])
                    for product, (left, _), g in zip(stack.products, owners, change)
                ]
            )
            asked = stack.scale * (wanted @ stack.R.mT), stack.scale * (stack.L.mT @ wanted)
            self._take(stack, nearest(stack, asked, self.damping), groups)
            yield from (p for sides in owners for p in sides)

    def _moments(self, product: Product, owner: nn.Parameter) -> dict[str, Any]:
        """The state of a product: its left parameter's, or a part of that for each view."""
        state: dict[str, Any] = self.state[owner]
        view = product.left()
        if view.numel() == owner.numel():
            return state
        state.setdefault(
            "step", torch.zeros((), dtype=torch.float32)
        )  # AdamW's loading asks for it
        place = f"from {view.storage_offset() - owner.storage_offset()}"
        part: dict[str, Any] = state.setdefault(place, {})
        return part

    def _adam(self, state: dict[str, Any], g: Tensor, group: dict[str, Any]) -> Tensor:
        """What AdamW would take from the product, lr aside."""
        b1, b2 = group["betas"]
        if "first" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["first"] = torch.zeros_like(g)
            if self.factored:
                state["rows"], state["columns"] = g.new_zeros(len(g)), g.new_zeros(g.shape[1])
            else:
                state["second"] = torch.zeros_like(g)
        state["step"] += 1
        t, square = float(state["step"]), g.square()
        first = state["first"].to(g.dtype).lerp(g, 1 - b1)
        state["first"] = first.bfloat16() if self.factored else first
        if self.factored:
            state["rows"].lerp_(square.mean(1), 1 - b2)
            state["columns"].lerp_(square.mean(0), 1 - b2)
            mean = state["rows"].mean().clamp_min(1e-30)
            second = state["rows"][:, None] * state["columns"] / mean
        else:
            second = state["second"].lerp_(square, 1 - b2)
        return (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + group["eps"])

    def _take(self, stack: Stack, pair: Pair, groups: Groups) -> None:
        for product, hL, hR in zip(stack.products, *pair):
            own = hR if product.gate is None else hR * inverse(product.gate)[:, None]
            views = zip((product.left(), product.right()), product.sides(), (hL, own))
            for side, parameter, h in views:
                lr, decay = float(groups[parameter]["lr"]), groups[parameter]["weight_decay"]
                side.mul_((1 - lr * decay) ** 0.5).sub_(h, alpha=lr)
