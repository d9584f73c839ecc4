"""Training a sparse update inside the base weights themselves, and taking it back exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finespun.errors import StateError, an
from finespun.hosts import Host, adapter_set_of, hosts_of, merge, unmerge
from finespun.hosts.adapter_set import Patch
from finespun.kernels.entries import Entries, entries_gradient, write_entries

_OWNER = "in_place"


@contextmanager
def in_place(model: nn.Module, name: str) -> Iterator[None]:
    """Inside the block the active adapter `name` is trained inside the base weights.

    Each layer makes its own product and no other; its backward pass forms the gradient of the K
    trained entries alone. Before the first forward pass after a step, w0 + c·v is written over
    those entries of the weight, rounded to its dtype; v stays in its own precision. What stood
    there is kept, K parameters, and put back, bit for bit, by `disabled`, by `unmerge`, and at the
    end of the block or by an error in it. The adapter counts as merged meanwhile. Raises
    StateError for other than linear layers, for updates that are not of few entries (SHiRA), and
    where the adapter is not active. Source: arXiv 2406.13175.
    """
    adapter_set = adapter_set_of(model)
    if all(name != active for active, _ in adapter_set.active):
        raise StateError(f"{adapter_set[name].name!r} is not active: activate it before training")
    hosts = list(hosts_of(model, name).values())
    for host in hosts:
        if not host.featured or name in host.slots.overlays:
            what = "has an overlay" if host.featured else f"is {an(host.kind)}"
            raise StateError(f"{host.name!r} {what}: it cannot be trained in place")
    merge(model, {name: 1.0}, undo="entries")
    for host in hosts:
        host.let_edit()
    inside: list[_Inside] = []
    try:
        inside.extend(_Inside(host, name) for host in hosts)
        yield
    finally:
        for layer in inside:
            layer.leave()
        if name in adapter_set.merged:
            unmerge(model)


class _Inside:
    """One layer whose weight holds an adapter's entries."""

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name, self.delta = host, name, host.delta(name)
        self.strength = host.adapter_set[name].strength
        index, _ = self._moves()
        self.at = Entries(index, (host.shape.out_features, host.shape.in_features))
        self.seen = id(index), index._version
        self.hook = host.layer.register_forward_pre_hook(self.write)
        host.slots.put("overlay", name, _OWNER, self.learn)

    def leave(self) -> None:
        """The layer is as it was."""
        self.hook.remove()
        self.host.slots.free(_OWNER)

    @torch.no_grad()
    def write(self, module: nn.Module, args: Any) -> None:
        """Write w0 + c·v over the entries."""
        adapter_set = self.host.adapter_set
        kept = (adapter_set.kept or {}).get(self.host.name)
        if self.name not in adapter_set.merged or not isinstance(kept, Patch):
            return
        index, values = self._moves()
        if (id(index), index._version) != self.seen:
            raise StateError(f"{self.host.name!r}: its entries changed while trained in place")
        before = kept.values.to(torch.promote_types(kept.values.dtype, torch.float32))
        after = before.add(values.to(before.dtype), alpha=self.strength)
        write_entries(self.host.read(self.host.stored()), index, after)

    def learn(self, x: Tensor) -> Tensor:
        """Zero, (..., out), whose backward hands the entries their gradient."""
        if self.name not in self.host.adapter_set.merged:
            return x.new_zeros(())
        values = self.strength * self._moves()[1]
        zero: Tensor = _Learn.apply(x, values, self.at)  # type: ignore[no-untyped-call]
        return zero

    def _moves(self) -> tuple[Tensor, Tensor]:
        found = self.delta.sparse()
        if found is None:
            raise StateError(f"{type(self.delta).__name__} is not an update of few entries")
        return found


class _Learn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, at: Entries) -> Tensor:
        ctx.save_for_backward(x)
        ctx.at, ctx.dtype = at, values.dtype
        return values.new_zeros(()).expand(*x.shape[:-1], at.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        return None, entries_gradient(dy.to(ctx.dtype), x.to(ctx.dtype), ctx.at), None
