"""The gradient of the loss with respect to chosen base weights, one weight at a time.

Masks and starts look at it before training: SHiRA, S2FT, LoRA-GA, LoRA-SB.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract import Structure
from finespun.errors import InputError, TrainingError
from finespun.hosts import Host, adapter_set_of, disabled
from finespun.hosts import sites as sites_of
from finespun.hosts.layers.quantised import quantised

Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, float]]
Add = Callable[[Tensor], None]


def estimate_gradients(
    model: nn.Module,
    sites: Iterable[str],
    batches: Iterable[Any],
    loss: Loss,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """G = ∂L/∂W0, shape (out, in), of every site, for L the mean loss over all batches.

    `loss(model, batch)` is the batch's mean loss (0-d), or (mean loss, weight) where batches count
    differently, by their labelled tokens, say: G = Σ w·∇L_b / Σ w. The model is its base meanwhile,
    in the mode (training or not) that it is in; nothing of it changes, frozen weights included. A
    weight's gradient is added to its sum on `device`, in float32 at least, and let go before the
    next one is formed. Of a weight that two modules share, G is that of the named module's use
    alone, also where an adapter acts at both (tie="both"); a layer that never ran has G = 0. Raises
    TargetError for unknown sites, InputError without batches or for a loss that is no number or
    does not depend on the weights, TrainingError where it is not finite.
    Source: arXiv 2407.05000 (LoRA-GA).
    """
    hosts = sites_of(model, sites, Structure())
    sums = {name: _zeros(host, device) for name, host in hosts.items()}
    total = 0.0
    base = disabled(model) if "_finespun_adapters" in model.__dict__ else nullcontext()
    with base, _frozen(model), _watched(list(hosts.values()), sums), torch.enable_grad():
        for batch in batches:
            found = loss(model, batch)
            value, weight = found if isinstance(found, tuple) else (found, 1.0)
            _check(value, weight)
            (value * weight).backward()
            total += weight
    if not total:
        raise InputError("no batches to estimate gradients from; give at least one")
    return {name: added.div_(total) for name, added in sums.items()}


def start_from_gradients(model: nn.Module, name: str, batches: Iterable[Any], loss: Loss) -> None:
    """Show every site of adapter `name` its gradient before training, where the structure wants it
    (`Structure.wants_gradient`): masks are chosen, starts drawn. Arguments and errors are those of
    `estimate_gradients`; StateError where the structure does not look at gradients."""
    deltas = adapter_set_of(model)[name].deltas
    gradients = estimate_gradients(model, deltas, batches, loss)
    for site, delta in deltas.items():
        gradient = gradients.pop(site)
        delta.start_from(gradient.to(delta.site.device))


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
def _frozen(model: nn.Module) -> Iterator[None]:
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
            watch = _tap if quantised(users[0].layer) else _alias
            undo.append(watch(users[0].layer, _adder(users, sums)))
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
    """Another parameter on the same numbers takes the weight's place: the original, its flags and
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


def _tap(layer: nn.Module, add: Add) -> Callable[[], None]:
    """A quantised weight has no gradient: δᵀ x of the layer's output is that of what it stands
    for."""
    anchor = torch.zeros((), requires_grad=True)

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(output, args[0], anchor, add)  # type: ignore[no-untyped-call]
        return tapped

    return layer.register_forward_hook(after).remove


class _Tap(torch.autograd.Function):
    """The identity, whose backward adds δᵀ x (out, in); `anchor` makes it part of a graph."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, add: Add) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        dtype = torch.promote_types(delta.dtype, torch.float32)
        ctx.add(delta.flatten(0, -2).to(dtype).mT @ x.flatten(0, -2).to(dtype))
        return delta, None, None, None
