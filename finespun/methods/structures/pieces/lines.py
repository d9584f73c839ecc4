"""Updates of whole lines: ΔW (out, in) is zero outside s chosen rows, or columns."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract.delta import Base, Delta, Factors
from finespun.contract.site import Site


class LinesDelta(Delta):
    """D beside `lines` (s,), the chosen rows (`dim` 0) or columns (1) of the weight, rising."""

    dim: ClassVar[int]

    def __init__(self, site: Site, lines: Tensor) -> None:
        super().__init__(site)
        size = [site.shape.out_features, site.shape.in_features]
        size[self.dim] = len(lines)
        self.D = nn.Parameter(torch.zeros(size, device=site.device))
        self.stand(lines)

    def stand(self, lines: Tensor) -> None:
        """Let the chosen lines stand at these places of the weight."""
        self.hold("lines", lines)
        self.entries: Tensor | None = None
        self.first = bool(torch.equal(lines.cpu(), torch.arange(len(lines))))

    @property
    def lines(self) -> Tensor:
        """Places of the chosen rows or columns, int64 (s,)."""
        return self.held("lines", self.D)

    def _places(self, size: int) -> Tensor:
        """S as (s, size): one in each row."""
        every = torch.arange(size, device=self.D.device)
        return (self.lines[:, None] == every).to(self.D.dtype)

    def sparse(self) -> tuple[Tensor, Tensor]:
        shape, device = self.site.shape, self.D.device
        if self.entries is None or self.entries.device != device:
            rows = torch.arange(shape.out_features, device=device)
            columns = torch.arange(shape.in_features, device=device)
            rows, columns = (self.lines, columns) if self.dim == 0 else (rows, self.lines)
            self.entries = (rows[:, None] * shape.in_features + columns).flatten()
        return self.entries, self.D.flatten()


class ColumnsDelta(LinesDelta):
    """D (out, s): only x[..., lines] is multiplied, and kept for the backward pass."""

    dim = 1

    def low_rank(self) -> Factors:
        return self._places(self.site.shape.in_features), self.D

    def product(self, x: Tensor) -> Tensor:
        s = len(self.lines)
        own = x[..., :s].contiguous() if self.first else x.index_select(-1, self.lines)
        return F.linear(own.to(self.D.dtype), self.D)


class RowsDelta(LinesDelta):
    """D (s, in): only δ[..., lines] reaches it in the backward pass."""

    dim = 0

    def low_rank(self) -> Factors:
        return self.D, self._places(self.site.shape.out_features).T

    def product(self, x: Tensor) -> Tensor:
        size = self.site.shape.out_features
        zeros = torch.zeros(*x.shape[:-1], size, dtype=self.D.dtype, device=x.device)
        return self._add(zeros, x)

    def through(self, x: Tensor, base: Base) -> Tensor:
        return super().through(x, base) if self.adjusted else self._add(base(x), x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        own = F.linear(x.to(self.D.dtype), self.D).to(y.dtype)
        return y.index_add(-1, self.lines, own)
