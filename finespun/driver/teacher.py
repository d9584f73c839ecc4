"""The model without its deltas, for a moment: what objectives compare with."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from finespun.contract.training import Heads
from finespun.errors import InputError, StateError, nearest
from finespun.hosts import View, adapter_set_of, disabled
from finespun.hosts.modes import evaluating


@contextmanager
def teaching(view: View, heads: Heads) -> Iterator[None]:
    """Inside the block the model has no deltas, no gain and no gradient and is in eval mode; modes
    and random state are put back. `heads` are those of `StepContext.teacher`. Raises InputError for
    heads that are not known, StateError where deltas are merged and the trained modules wanted."""
    if not isinstance(heads, Mapping) and heads not in ("own", "fresh"):
        raise InputError(f"heads={heads!r} is not known; try 'own', 'fresh' or context.snapshot()")
    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(same_random_state(view.model))
        undo.enter_context(evaluating(view.model))
        if heads == "fresh":
            undo.enter_context(disabled(view.model))
        else:
            undo.enter_context(_without_deltas(view))
            if isinstance(heads, Mapping):
                undo.enter_context(_with_heads(view, heads))
        yield


def snapshot(view: View) -> dict[str, Tensor]:
    """Copies of the trained modules' tensors, by MODULE/NAME."""
    return {key: tensor.detach().clone() for key, tensor in _head_tensors(view).items()}


@contextmanager
def same_random_state(model: nn.Module) -> Iterator[None]:
    """torch's generators are afterwards as they were, those of the model's devices included."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=lambda d: d.index or 0)):
        yield


@contextmanager
def _without_deltas(view: View) -> Iterator[None]:
    """Every delta's strength is 0; trained modules stay."""
    adapter_set = adapter_set_of(view.model)
    if adapter_set.merged:
        raise StateError(
            f"{', '.join(adapter_set.merged)} is merged into the weights: a teacher with the "
            "trained modules cannot be shown; unmerge first, or ask for heads='fresh'"
        )
    before = {name: live.strength for name, live in adapter_set.attached.items()}
    for live in adapter_set.attached.values():
        live.strength = 0.0
    try:
        yield
    finally:
        for name, scale in before.items():
            adapter_set.attached[name].strength = scale


@contextmanager
def _with_heads(view: View, heads: Mapping[str, Tensor]) -> Iterator[None]:
    """The trained modules hold other tensors; pointers change, so that no graph sees a write."""
    own = _head_tensors(view)
    for key, tensor in heads.items():
        if key not in own:
            raise InputError(f"no trained module has a tensor {key!r}; {nearest(key, own)}")
        if own[key].shape != tensor.shape:
            raise InputError(f"{key!r} is {tuple(tensor.shape)}, not {tuple(own[key].shape)}")
    before = {key: own[key].data for key in heads}
    for key, tensor in heads.items():
        own[key].data = tensor.to(own[key])
    try:
        yield
    finally:
        for key, data in before.items():
            own[key].data = data


def _head_tensors(view: View) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, module in view.copies.items()
        for key, tensor in (*module.named_parameters(), *module.named_buffers())
    }
