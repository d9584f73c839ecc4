"""DoRA: a trained length for every row, LoRA for its direction (arXiv 2402.09353)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract.beside import Beside
from finespun.contract.delta import Bank, Base, Delta
from finespun.contract.products import Product
from finespun.contract.row_form import RowForm
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    register,
)
from finespun.linalg import LowRank
from finespun.methods.structures.pieces.extras import OwnBias, extra, extra_parameters


@register
@dataclass(frozen=True, kw_only=True)
class DoRA(Ranked):
    """W = m·V / ‖V‖, V = W0 + c·B·A, row by row;  A (r, in), B (out, r), m (out,).

    Good for: length and direction of every row learned apart, at LoRA's count.
    Not for: fast steps, as W0 + c·B·A is formed in each; LoRA servers.

    r·(in + out) + out parameters; the update has full rank. The norm ‖V‖ follows V but is held
    constant in the gradient, as in the paper. m starts at the norms of W0 and B at zero; A is drawn
    as LoRA's. The bias stays. Source: arXiv 2402.09353.
    """

    kind = "dora"
    source = "arXiv 2402.09353"

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> Delta:
        choice, name = plan.choices[site.shape.name], site.shape.name
        other = extra(site, choice)
        if other is not None:
            return other
        kind: type[DoRADelta] = BiasedDoRADelta if choice.get("bias") else DoRADelta
        delta = kind(site, choice["rank"], choice["scale"])
        delta.A.data.copy_(self.kaiming(name, "A", delta.A.shape))
        if self.draws:
            delta.m.data.copy_(delta.norm(delta.base_weight()))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        if (beside := extra_parameters(shape, choice)) is not None:
            return beside
        bias = shape.out_features if choice.get("bias") else 0
        return (
            bias
            + self.rank_of(choice) * (shape.in_features + shape.out_features)
            + shape.out_features
        )

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """LoRA's and three per output; the norms of V once."""
        out, inner = shape.out_features, shape.in_features
        per_row = 2 * self.rank_of(choice) * (inner + out) + 3 * out
        return tokens * per_row + 2 * (self.rank_of(choice) + 1) * out * inner


class DoRADelta(Delta):
    """A (r, in), B (out, r) and the magnitudes m (out,)."""

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site)
        out, inner, device = site.shape.out_features, site.shape.in_features, site.device
        self.scale = scale
        self.A = nn.Parameter(torch.zeros(rank, inner, device=device))
        self.B = nn.Parameter(torch.zeros(out, rank, device=device))
        self.m = nn.Parameter(torch.zeros(out, device=device))

    def take_factors(self, A: Tensor, B: Tensor, apart: bool = False, refine: int = 0) -> float:
        """As the direction's; the magnitudes stay."""
        if A.shape != self.A.shape:
            return super().take_factors(A, B, apart, refine)
        self.A.data.copy_(A)
        self.B.data.copy_(B)
        return 0.0

    def norm(self, w0: Tensor) -> Tensor:
        """‖V‖ of every row, (out,), a constant to the gradient; never zero."""
        V = torch.addmm(w0, self.B.detach(), self.A.detach(), alpha=self.scale)
        return torch.linalg.vector_norm(V, dim=1).clamp_min(torch.finfo(V.dtype).tiny)

    def map_weight(self, w0: Tensor) -> Tensor:
        V = torch.addmm(w0, self.B, self.A, alpha=self.scale)
        return V * (self.m / self.norm(w0))[:, None]

    def through(self, x: Tensor, base: Base) -> Tensor:
        """y + (g − 1) (y − b0) + g·c·B A x with g = m / ‖V‖ and y = base(x)."""
        y, b0 = base(x), self.site.bias()
        gain = self.m / self.norm(self.base_weight())
        plain = y if b0 is None else y - b0
        change = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * self.scale
        return y + ((gain - 1) * plain + gain * change).to(y.dtype)

    def products(self) -> list[Product]:
        """c·B·A, which is added to W0; m is in none."""
        return [] if self.dead else [Product.of(lambda: self.B, lambda: self.A, self.scale)]

    def written_beside(self) -> Beside:
        factors = LowRank(self.A.detach(), self.B.detach() * self.scale)
        return Beside(factors, self.m.detach())

    def own_row_form(self) -> RowForm:
        """W = g ∘ (W0 + c·B·A) with g = m / ‖V‖, and the bias is not gained."""
        gain, b0 = self.m / self.norm(self.base_weight()), self.site.bias()
        up = gain[:, None] * self.B * self.scale
        if b0 is None:
            return RowForm(g_out=gain, A=self.A, B=up)
        b0 = b0.detach().to(gain)
        return RowForm(g_out=gain, A=self.A, B=up, db=self.map_bias(b0) - gain * b0)


class BiasedDoRADelta(DoRADelta, OwnBias):
    """A DoRA beside a trained bias; the layer takes the dense path."""

    through = Delta.through

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, scale)
        self._take_bias()
