"""LoRA: ΔW = (alpha / r) B A, rank-stabilised on request (arXiv 2106.09685, 2312.03732)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finespun.contract import fitting
from finespun.contract.delta import Bank, Delta, Factors
from finespun.contract.groups import Group
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    register,
)
from finespun.errors import InputError
from finespun.linalg import LowRank
from finespun.methods.structures.pieces.extras import OwnBias, extra, extra_parameters


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(Ranked):
    """ΔW = c·B·A;  A (r, in), B (out, r);  r·(in + out) parameters.

    Good for: a first try; every library and server takes it.
    Not for: the smallest adapters: lsr, vera and unilora need fewer parameters.

    c = alpha / r, or alpha / √r with `rslora`. B starts at zero; A is drawn uniformly with variance
    1/(3·in) (`start="kaiming"`) or normally with standard deviation 1/r (`start="gaussian"`).
    Source: arXiv 2106.09685; rank-stabilised scale: arXiv 2312.03732.
    """

    rslora: bool = False
    start: Literal["kaiming", "gaussian"] = "kaiming"

    kind = "lora"
    source = "arXiv 2106.09685"
    aliases = {**Ranked.aliases, "use_rslora": "rslora"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("kaiming", "gaussian"):
            raise InputError(f"start={self.start!r} is not known; try 'kaiming' or 'gaussian'")

    @property
    def scale(self) -> float:
        return super().scale * (math.sqrt(self.rank) if self.rslora else 1.0)

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> Delta:
        choice = plan.choices[site.shape.name]
        other = extra(site, choice)
        if other is not None:
            return other
        kind: type[LoRADelta] = BiasedLoRADelta if choice.get("bias") else LoRADelta
        delta = kind(site, choice["rank"], choice["scale"])
        if not self.draws:
            return delta
        if self.start == "kaiming":
            drawn = self.kaiming(site.shape.name, "A", delta.A.shape)
        else:
            g = self.generator(site.shape.name, "A")
            drawn = torch.randn(delta.A.shape, generator=g) / choice["rank"]
        delta.A.data.copy_(drawn)
        return delta

    def exactly(self, site: Site, update: LowRank, scale: float) -> tuple[Delta, Choice]:
        return lora_of(site, update, scale)

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        if (beside := extra_parameters(shape, choice)) is not None:
            return beside
        bias = shape.out_features if choice.get("bias") else 0
        return bias + self.rank_of(choice) * (shape.in_features + shape.out_features)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return 2 * tokens * self.rank_of(choice) * (shape.in_features + shape.out_features)


class LoRADelta(Delta):
    """A (r, in) and B (out, r) of one site; one `rank` group for each row of A and column of B."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site)
        self.scale = scale
        self.A = nn.Parameter(torch.zeros(rank, site.shape.in_features, device=site.device))
        self.B = nn.Parameter(torch.zeros(site.shape.out_features, rank, device=site.device))

    def low_rank(self) -> Factors:
        return self.A, self.B

    def groups(self, kind: str) -> list[Group]:
        if kind != "rank":
            return []
        every = slice(None)
        return [
            Group("rank", f"rank {i}", (("A", (i, every)), ("B", (every, i))))
            for i in range(len(self.A))
        ]

    @torch.no_grad()
    def assign(
        self, update: LowRank | Tensor, covariance: Tensor | None = None, refine: int = 0
    ) -> float:
        """In closed form: the leading terms of the singular value decomposition of ΔW·C^½; what
        fits is taken over as it is."""
        if self.adjusted or self.masks():
            return super().assign(update, covariance, refine)
        root, rank = math.sqrt(self.scale), len(self.A)
        best, error = fitting.truncated(update, rank, covariance)
        self.A[: best.rank], self.B[:, : best.rank] = best.A / root, best.B / root
        self.A[best.rank :], self.B[:, best.rank :] = 0, 0
        return error

    def take_factors(self, A: Tensor, B: Tensor, apart: bool = False, refine: int = 0) -> float:
        """As they are, where there are as many ranks."""
        if self.adjusted or self.masks() or A.shape != self.A.shape:
            return super().take_factors(A, B, apart, refine)
        self.A.data.copy_(A)
        self.B.data.copy_(B)
        return 0.0

    def predicted(self, update: LowRank) -> float:
        return update.error(min(len(self.A), update.rank))

    def compact(self) -> "tuple[LoRADelta, dict[str, Any]]":
        A, B = (t.detach() for t in self.complete((self.A, self.B)))
        alive = torch.ones(len(self.A), dtype=torch.bool)
        if (mask := self.masks().get("A")) is not None:
            alive &= mask.any(1).cpu()
        if self.gating is not None:
            alive &= self.gating.detach().cpu().ne(0)
        alive = alive.repeat(len(A) // len(self.A))
        alive[0] |= not alive.any()
        return lora_of(self.site, LowRank(A[alive], B[:, alive]), self.scale)


class BiasedLoRADelta(LoRADelta, OwnBias):
    """A LoRA beside a trained bias b (out,)."""

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, scale)
        self._take_bias()

    def compact(self) -> tuple[LoRADelta, dict[str, Any]]:
        small, choice = super().compact()
        biased = BiasedLoRADelta(self.site, len(small.A), small.scale)
        biased.load_state_dict({**small.state_dict(), "b": self.b.detach()})
        return biased, {**choice, "bias": True}


def lora_of(site: Site, update: LowRank, scale: float = 1.0) -> tuple[LoRADelta, dict[str, Any]]:
    """A LoRA delta with ΔW = scale · update.B update.A, and the plan's choices for it."""
    delta = LoRADelta(site, update.A.shape[0], scale)
    delta.A.data.copy_(update.A)
    delta.B.data.copy_(update.B)
    return delta, {"rank": update.A.shape[0], "scale": scale}
