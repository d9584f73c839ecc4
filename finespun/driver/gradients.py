"""The gradient of the loss with respect to chosen base weights, one weight at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finespun.driver.reducing import reduced
from finespun.errors import InputError, TrainingError
from finespun.hosts import Host
from finespun.hosts.layers.quantised import quantised
from finespun.linalg import LowRank

Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, float]]
Add = Callable[[Tensor], None]
Told = Callable[[Tensor, Tensor], None]


class Sums:
    """Σ w·∇L_b of every site, one batch after another."""

    def __init__(self, sums: dict[str, Tensor], device: torch.device) -> None:
        self.sums, self.device, self.total = sums, device, 0.0

    def add(self, found: Tensor | tuple[Tensor, float]) -> None:
        """Go backwards from a batch's mean loss, or from (mean loss, weight). Raises InputError for
        what is no loss, TrainingError where it is not finite."""
        value, weight = found if isinstance(found, tuple) else (found, 1.0)
        _check(value, weight)
        (value * weight).backward()
        self.total += weight

    def turn(self) -> None:
        """A pass over all batches is over."""

    def means(self) -> Mapping[str, Tensor | LowRank]:
        """Σ w·∇L_b / Σ w over the rows of all ranks. Raises InputError where there was no batch."""
        total = float(reduced(torch.tensor(self.total, dtype=torch.float64), self.device))
        if not total:
            raise InputError("no batches to estimate gradients from; give at least one")
        return {n: reduced(added, self.device).div_(total) for n, added in self.sums.items()}


@contextmanager
def watch_gradients(
    model: nn.Module, hosts: Mapping[str, Host], device: torch.device | str
) -> Iterator[Sums]:
    """Add up the gradients of these sites' weights on `device`, in float32 at least; each is let go
    before the next one is formed, and no parameter of the model asks for one. Raises InputError for
    blocks."""
    for name, host in hosts.items():
        if host.shape.kind == "block":
            raise InputError(f"{name!r} is a block: it has no weight to look at the gradient of")
    sums = {name: _zeros(host, device) for name, host in hosts.items()}
    with frozen(model), _watched(list(hosts.values()), sums):
        yield Sums(sums, next(model.parameters()).device)


def _check(value: Any, weight: Any) -> None:
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        raise InputError(
            f"loss(model, batch) must be a 0-d tensor that depends on the sites, not {value!r}; "
            "try lambda model, batch: model(**batch).loss"
        )
    if not weight > 0:
        raise InputError(f"loss(model, batch) gave the weight {weight}, which must be positive")
    if not torch.isfinite(value):
        raise TrainingError(f"the loss is {value.item()} while gradients are estimated")


def _zeros(host: Host, device: torch.device | str) -> Tensor:
    dtype = torch.promote_types(host.dtype, torch.float32)
    return torch.zeros(host.shape.out_features, host.shape.in_features, dtype=dtype, device=device)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model asks for a gradient."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _watched(hosts: Sequence[Host], sums: dict[str, Tensor]) -> Iterator[None]:
    """Every layer hands the gradient of its weight over as soon as it is there."""
    layers: dict[int, list[Host]] = {}
    for host in hosts:
        layers.setdefault(id(host.layer), []).append(host)
    undo: list[Callable[[], None]] = []
    try:
        for users in layers.values():
            layer, add = users[0].layer, _adder(users, sums)
            undo.append(tap(layer, _formed(add)) if quantised(layer) else _alias(layer, add))
        yield
    finally:
        for step in undo:
            step()


def _adder(users: Sequence[Host], sums: dict[str, Tensor]) -> Add:
    def add(gradient: Tensor) -> None:
        for host in users:
            own = sums[host.name]
            own.add_(host.read((gradient, None)).to(own.device, own.dtype))

    return add


def _alias(layer: Any, add: Add) -> Callable[[], None]:
    """Another parameter on the same storage takes the weight's place: the original, its flags and
    its other users see nothing."""
    original = layer._parameters["weight"]
    alias = nn.Parameter(original.data)

    def ready(parameter: Tensor) -> None:
        if parameter.grad is not None:
            add(parameter.grad)
        parameter.grad = None

    alias.register_post_accumulate_grad_hook(ready)
    layer._parameters["weight"] = alias

    def undo() -> None:
        layer._parameters["weight"] = original

    return undo


def _formed(add: Add) -> Told:
    """δᵀ x, the gradient of the weight, formed and added."""
    return lambda x, delta: add(delta.mT @ x)


def tap(layer: nn.Module, told: Told) -> Callable[[], None]:
    """Hand over x (rows, in) and δ (rows, out), the gradient of the output, of every pass through a
    layer, in float32 at least. A quantised weight has no gradient: δᵀ x is that of what it stands
    for. Returns how to stop."""
    anchor = torch.zeros((), requires_grad=True)

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(output, args[0], anchor, told)  # type: ignore[no-untyped-call]
        return tapped

    return layer.register_forward_hook(after).remove


class _Tap(torch.autograd.Function):
    """The identity, whose backward hands over x and δ; `anchor` makes it part of a graph."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, told: Told) -> Tensor:
        ctx.save_for_backward(x)
        ctx.told = told
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        dtype = torch.promote_types(delta.dtype, torch.float32)
        ctx.told(x.flatten(0, -2).to(dtype), delta.flatten(0, -2).to(dtype))
        return delta, None, None, None
