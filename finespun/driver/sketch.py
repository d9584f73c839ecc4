"""Gradients by their main directions, from two passes: nothing of size out x in is held.

Pass 1: Y = Σ δᵀ (x Ω), Ω (in, q) drawn, Q = orth(Y). Pass 2: Z = Σ (δ Q)ᵀ x, and G ≈ Q Z, with δ
the gradient of a layer's output and x what it reads.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from finespun.driver.gradients import Sums, frozen, tap
from finespun.driver.reducing import reduced
from finespun.errors import InputError
from finespun.hosts import Host
from finespun.linalg import LowRank, streams


class Sketches(Sums):
    """Y and Q (out, q), then Z (q, in), of every site."""

    def __init__(self, hosts: Mapping[str, Host], width: int, device: torch.device) -> None:
        super().__init__({}, device)
        self.probes = {n: _probes(h, width) for n, h in hosts.items()}
        self.bases: dict[str, Tensor] = {}

    def take(self, name: str, x: Tensor, delta: Tensor) -> None:
        """Add what a pass shows of one site: x (rows, in), delta (rows, out)."""
        if name in self.bases:
            told = (delta @ self.bases[name].to(delta)).mT @ x
        else:
            told = delta.mT @ (x @ self.probes[name].to(x))
        self.sums[name] = self.sums[name].add_(told) if name in self.sums else told

    def turn(self) -> None:
        """A pass is over: the first gives the bases."""
        if self.bases:
            return
        if not self.total:
            self.means()
        whole = {n: reduced(Y, self.device) for n, Y in self.sums.items()}
        self.bases = {n: torch.linalg.qr(Y)[0] for n, Y in whole.items()}
        self.sums, self.total = {}, 0.0

    def means(self) -> Mapping[str, Tensor | LowRank]:
        """G ≈ Q Z of every site."""
        found = super().means()
        return {n: LowRank(Z, self.bases[n]) for n, Z in found.items() if isinstance(Z, Tensor)}


def _probes(host: Host, width: int) -> Tensor:
    shape = host.shape
    if shape.kind != "linear" or ":" in shape.name:
        raise InputError(f"{shape.name!r} is no whole linear layer, and sketches are of these")
    size = shape.in_features, min(width, shape.in_features, shape.out_features)
    return streams.normal(streams.key(0, shape.name, "sketch"), size)


@contextmanager
def watch_sketches(model: nn.Module, hosts: Mapping[str, Host], width: int) -> Iterator[Sketches]:
    """Sketch the gradients of these sites by `width` directions. Raises InputError for tables,
    convolutions and blocks, and for a width below 1."""
    if width < 1:
        raise InputError(f"sketch={width} must be at least 1; try four times the rank")
    found = Sketches(hosts, width, next(model.parameters()).device)
    with frozen(model), ExitStack() as undo:
        for name, host in hosts.items():
            undo.callback(tap(host.layer, partial(found.take, name)))
        yield found
