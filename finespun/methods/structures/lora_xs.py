"""LoRA-XS: only an r x r core is trained, between frozen directions of W0 (arXiv 2405.17604)."""

from dataclasses import dataclass
from typing import Any, Literal

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
    must_be_one_of,
    register,
)
from finespun.errors import InputError
from finespun.linalg import randomized_svd_of


@register
@dataclass(frozen=True, kw_only=True)
class LoRAXS(Ranked):
    """ΔW = c·B·R·A;  R (r, r) trained, A (r, in) and B (out, r) frozen: r² parameters.

    Good for: the smallest adapters: r² parameters a layer, whatever its size.
    Not for: loading without the base's exact weights: A and B are their SVD.

    `start="weight"`: B = U_r, A = S_r V_rᵀ from the SVD of W0, computed when built and never saved.
    `start="gradient"`: A and B stay zero until an initializer gives them by `set_basis` (LoRA-SB);
    they are saved then. R starts at zero, or normal with deviation `noise` (1e-5 in the paper,
    which then does not start at the base). c is 1, or alpha / r where alpha is given.
    Source: arXiv 2405.17604; the gradient's basis: arXiv 2411.19557.
    """

    rank: int = 16
    start: Literal["weight", "gradient"] = "weight"
    noise: float = 0.0

    kind = "lora_xs"
    title = "LoRA-XS"
    source = "arXiv 2405.17604"
    default_scale = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        must_be_one_of("start", self.start, ("weight", "gradient"))
        if self.noise < 0:
            raise InputError(f"noise={self.noise} must not be negative; try {-self.noise}")

    @property
    def starts_at_zero(self) -> bool:
        return self.noise == 0

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "LoRAXSDelta":
        choice: Any = plan.choices[site.shape.name]
        delta = LoRAXSDelta(site, choice["rank"], choice["scale"], kept=self.start == "gradient")
        if self.start == "weight":
            delta.set_basis(*main_directions(site.weight().detach(), choice["rank"]))
        if self.noise:
            g = self.generator(site.shape.name, "R")
            delta.R.data.copy_(self.noise * torch.randn(delta.R.shape, generator=g))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return self.rank_of(choice) ** 2

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return (
            2
            * tokens
            * self.rank_of(choice)
            * (shape.in_features + shape.out_features + self.rank_of(choice))
        )


def main_directions(W: Tensor, rank: int) -> Factors:
    """A = S_r V_rᵀ (r, in) and B = U_r (out, r), the r main terms of W = U S Vᵀ. The number of
    largest size in each column of B is positive, so that every machine finds the same signs."""
    U, S, Vh = randomized_svd_of(W, rank, oversample=rank + 10, power=4)
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return (S * signs[0])[:, None] * Vh, U * signs


class LoRAXSDelta(Delta):
    """R (r, r); the frozen A (r, in) and B (out, r) are saved only where `kept`."""

    def __init__(self, site: Site, rank: int, scale: float, kept: bool) -> None:
        super().__init__(site)
        self.scale, self.kept, shape, device = scale, kept, site.shape, site.device
        self.R = nn.Parameter(torch.zeros(rank, rank, device=device))
        for name, size in (("A", (rank, shape.in_features)), ("B", (shape.out_features, rank))):
            zero = torch.zeros(size, device=device)
            (self.register_buffer if kept else self.hold)(name, zero)

    def basis(self) -> Factors:
        """The frozen A (r, in) and B (out, r)."""
        if self.kept:
            return self._buffers["A"], self._buffers["B"]  # type: ignore[return-value]
        return self.held("A", self.R), self.held("B", self.R)

    def set_basis(self, A: Tensor, B: Tensor) -> None:
        """Freeze these directions: A (r, in), B (out, r)."""
        for own, new in zip(self.basis(), (A, B)):
            own.copy_(new)

    def low_rank(self) -> Factors:
        A, B = self.basis()
        return self.R @ A, B

    def product(self, x: Tensor) -> Tensor:
        A, B = self.basis()
        return F.linear(F.linear(F.linear(x.to(A.dtype), A), self.R), B) * self.scale
