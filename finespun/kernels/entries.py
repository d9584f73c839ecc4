"""Products with a matrix S (out, in) that is zero outside K entries: x Sᵀ, and its backward.

The plain reference writes S out. The fast version never does: the product, and the gradient at the
K entries alone, cost K multiply-adds a row of x each. At two entries in a hundred of 768 x 768 it
takes a tenth of the time of the dense product; above one in ten the dense one wins.
"""

import warnings
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finespun.kernels.lowrank import plain

WORTH = 10  # one entry in so many


class Entries:
    """The places of K entries in an (out, in) matrix: `index` (K,) int64, rising, counted row by
    row. Held as compressed rows, and those of the transpose for the gradient of x."""

    def __init__(self, index: Tensor, shape: tuple[int, int]) -> None:
        self.index, self.shape = index, shape
        row, column = (index // shape[1]).int(), (index % shape[1]).int()
        self.rows = _starts(row, shape[0]), column

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where columns begin, the row of each entry column by column, and the order that is."""
        column = self.rows[1]
        order = torch.argsort(column, stable=True).int()
        row = (self.index // self.shape[1]).int()
        return _starts(column[order], self.shape[1]), row[order], order

    def matrix(self, v: Tensor) -> Tensor:
        """S with the values v (K,), in compressed rows."""
        return _compressed(*self.rows, v, self.shape)

    def transposed(self, v: Tensor) -> Tensor:
        """Sᵀ likewise."""
        starts, rows, order = self.columns
        return _compressed(starts, rows, v[order], (self.shape[1], self.shape[0]))

    def dense(self, v: Tensor) -> Tensor:
        """S written out."""
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=v.dtype, device=v.device)
        return flat.index_copy(0, self.index, v).view(self.shape)


def entries_linear(x: Tensor, v: Tensor, at: Entries) -> Tensor:
    """x Sᵀ for x (..., in) and the values v (K,) of S: (..., out), in the dtype of v."""
    x = x.to(v.dtype)
    few = WORTH * len(v) <= at.shape[0] * at.shape[1]
    if not few or v.dtype.itemsize < 4 or not plain(x, v):
        return entries_linear_reference(x, v, at)
    return _Product.apply(x, v, at)  # type: ignore[no-untyped-call]


def entries_linear_reference(x: Tensor, v: Tensor, at: Entries) -> Tensor:
    """The same with S written out, for any tensors."""
    return F.linear(x.to(v.dtype), at.dense(v))


def entries_gradient(dy: Tensor, x: Tensor, at: Entries) -> Tensor:
    """dyᵀ x at the K entries alone, (K,), for dy (..., out) and x (..., in) of one dtype."""
    return _Sample.apply(dy, x, at)  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """x, v -> x S(v)ᵀ; differentiable any number of times, as `_Sample` is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, at: Entries) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.at = at
        rows = x.reshape(-1, x.shape[-1])
        return (at.matrix(v) @ rows.T).T.reshape(*x.shape[:-1], at.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, v = ctx.saved_tensors
        dx = _Back.apply(dy, v, ctx.at) if ctx.needs_input_grad[0] else None  # type: ignore[no-untyped-call]
        dv = _Sample.apply(dy, x, ctx.at) if ctx.needs_input_grad[1] else None  # type: ignore[no-untyped-call]
        return dx, dv, None


class _Back(torch.autograd.Function):
    """dy, v -> dy S(v)."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, v: Tensor, at: Entries) -> Tensor:
        ctx.save_for_backward(dy, v)
        ctx.at = at
        rows = dy.reshape(-1, dy.shape[-1])
        return (at.transposed(v) @ rows.T).T.reshape(*dy.shape[:-1], at.shape[1])

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor, None]:
        dy, v = ctx.saved_tensors
        return _Product.apply(dx, v, ctx.at), _Sample.apply(dy, dx, ctx.at), None  # type: ignore[no-untyped-call]


class _Sample(torch.autograd.Function):
    """dy, x -> dyᵀ x at the entries."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, at: Entries) -> Tensor:
        ctx.save_for_backward(dy, x)
        ctx.at = at
        empty = at.matrix(dy.new_zeros(len(at.index)))
        rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        found: Tensor = torch.sparse.sampled_addmm(empty, rows[0].T, rows[1]).values()
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        dy, x = ctx.saved_tensors
        return _Product.apply(x, g, ctx.at), _Back.apply(dy, g, ctx.at), None  # type: ignore[no-untyped-call]


def entries_of(W: Tensor, index: Tensor) -> Tensor:
    """A copy of the entries `index` (K,) of W (out, in)."""
    memory, places = _in_memory(W, index)
    return memory.index_select(0, places)


def write_entries(W: Tensor, index: Tensor, values: Tensor) -> None:
    """Write values (K,) over the entries `index` of W (out, in), in place, rounded to its dtype."""
    memory, places = _in_memory(W, index)
    memory.index_copy_(0, places, values.to(W.dtype))


def _in_memory(W: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The memory of W (out, in) as one line, and where the entries `index` lie in it: picking from
    a line and copying into it take a third of the time that indexing takes."""
    if W.is_contiguous():
        return W.view(-1), index
    (rows, columns), (down, across) = W.shape, W.stride()
    memory = W.as_strided(((rows - 1) * down + (columns - 1) * across + 1,), (1,))
    return memory, index // columns * down + index % columns * across


def _starts(lines: Tensor, count: int) -> Tensor:
    """Where each of `count` lines begins in the rising numbers `lines`, and the end."""
    edges = torch.arange(count + 1, dtype=torch.int32, device=lines.device)
    return torch.searchsorted(lines, edges, out_int32=True)


def _compressed(starts: Tensor, places: Tensor, v: Tensor, shape: tuple[int, int]) -> Tensor:
    _accept()
    return torch.sparse_csr_tensor(starts, places, v, shape, check_invariants=False)


@lru_cache(maxsize=1)
def _accept() -> None:
    """Torch says once that compressed rows are in beta: it is raised and silenced here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(none, none[:0], torch.zeros(0), (0, 1), check_invariants=False)
