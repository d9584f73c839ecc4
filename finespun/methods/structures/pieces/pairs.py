"""Trained A and B that all sites of one shape share: the bank of Tied-LoRA and S2-LoRA."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from finespun.contract.delta import Bank, Delta, Factors
from finespun.contract.site import Site, SiteShape


def pair_sizes(shapes: Iterable[SiteShape], sliced: bool = False) -> list[tuple[int, int]]:
    """The (out, in) of every pair: one for each distinct shape, or with `sliced` a single one of
    the greatest sides, of which each site takes the first rows and columns."""
    sizes = sorted({(s.out_features, s.in_features) for s in shapes})
    return [(max(o for o, _ in sizes), max(i for _, i in sizes))] if sliced and sizes else sizes


class Pairs(Bank):
    """A (r, in) as A_OUTxIN and B (out, r) as B_OUTxIN for each of `sizes`, zero until drawn."""

    def __init__(self, sizes: Iterable[tuple[int, int]], rank: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        for out, inner in self.sizes:
            self.register_parameter(f"A_{out}x{inner}", nn.Parameter(torch.zeros(rank, inner)))
            self.register_parameter(f"B_{out}x{inner}", nn.Parameter(torch.zeros(out, rank)))

    def pair(self, out: int, inner: int) -> Factors:
        """A (r, inner) and B (out, r) for a site of this shape."""
        size = (out, inner) if (out, inner) in self.sizes else self.sizes[0]
        A, B = (getattr(self, f"{side}_{size[0]}x{size[1]}") for side in "AB")
        return A[:, :inner], B[:out]


class PairsDelta(Delta):
    """A delta whose A and B lie in a bank of pairs; its `forward` never copies them."""

    per_sample = False

    def __init__(self, site: Site, bank: Bank | None, scale: float) -> None:
        super().__init__(site, Pairs.at(bank, site))
        self.scale = scale

    def shared(self) -> Factors:
        """The bank's A (r, in) and B (out, r) for this site."""
        bank: Any = self.bank
        pair: Factors = bank.pair(self.site.shape.out_features, self.site.shape.in_features)
        return pair

    def direct(self, tokens: int, formed: bool) -> bool:
        return not self.adjusted
