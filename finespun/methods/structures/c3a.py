"""C3A: blocks that are circular convolutions (arXiv 2407.19342)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft

from finespun.contract.delta import Bank, Delta
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Structure,
    must_divide,
    register,
)
from finespun.errors import InputError


@register
@dataclass(frozen=True, kw_only=True)
class C3A(Structure):
    """Block (m, n) of ΔW is circulant: entry (k, t) is w[m, n, (t − k) mod b] / in.

    Good for: an update of full rank from in·out/b parameters.
    Not for: LoRA servers; layers whose sides have no common divisor near the block you want.

    w (out/b, in/b, b), zero at the start: out·in/b parameters; every block has rank up to b, the
    update up to full. b = `block_size` must divide in and out. Multiplied by real FFTs of length b:
    y_m = irfft(Σ_n rfft(x_n)·conj(rfft(w_mn))) / in. (The library draws w at random; since ΔW is
    linear in w, that start with its own update taken away is this one.) Divided by `in`, w needs
    learning rates around 1.
    Source: arXiv 2407.19342.
    """

    block_size: int = 256

    kind = "c3a"
    default_lr = 1.0
    source = "arXiv 2407.19342"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise InputError(f"block_size={self.block_size} must be at least 1; try 256")

    def choose(self, site: Site) -> dict[str, Any]:
        must_divide("block_size", self.block_size, site.shape)
        return {"block_size": self.block_size}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "C3ADelta":
        return C3ADelta(site, plan.choices[site.shape.name]["block_size"])

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        b = choice.get("block_size", self.block_size)
        return int(shape.out_features * shape.in_features // b)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """2.5·b·log2 b for a real FFT, eight for a complex multiply-add; those of w once."""
        b = choice.get("block_size", self.block_size)
        rows, columns = shape.out_features // b, shape.in_features // b
        transform = math.ceil(2.5 * b * math.log2(b)) if b > 1 else 1
        products = 8 * rows * columns * (b // 2 + 1)
        return int(tokens * ((rows + columns) * transform + products) + rows * columns * transform)


class C3ADelta(Delta):
    """w (out/b, in/b, b)."""

    reads_base = False

    def __init__(self, site: Site, b: int) -> None:
        super().__init__(site)
        rows, columns = site.shape.out_features // b, site.shape.in_features // b
        self.w = nn.Parameter(torch.zeros(rows, columns, b, device=site.device))

    def delta(self, w0: Tensor) -> Tensor:
        i = torch.arange(self.w.shape[-1], device=self.w.device)
        blocks = self.w[..., (i - i[:, None]) % len(i)]
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1) / w0.shape[1]

    def product(self, x: Tensor) -> Tensor:
        b = self.w.shape[-1]
        if not x.numel():  # transforms refuse to do nothing
            return self.w.new_zeros(*x.shape[:-1], self.site.shape.out_features)
        X = rfft(x.to(self.w.dtype).unflatten(-1, (-1, b)))
        Y = torch.einsum("...nf,mnf->...mf", X, rfft(self.w).conj())
        return irfft(Y, n=b).flatten(-2) / x.shape[-1]

    def direct(self, tokens: int, formed: bool) -> bool:
        return not self.adjusted and self.w.shape[-1] > 16
