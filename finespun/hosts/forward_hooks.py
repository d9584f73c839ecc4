"""What happens where a forward pass of the root begins and ends, whatever method calls it."""

import re
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from finespun.errors import StateError
from finespun.hosts.adapter_set import AdapterSet, Patch, adapter_set_of
from finespun.hosts.attached import Attached
from finespun.hosts.factor_cache import FactorCache
from finespun.hosts.foreign import refuse_frozen_by_peft
from finespun.hosts.freezing import in_training, was_trainable
from finespun.hosts.insertion import all_hosts
from finespun.hosts.layers.copies import CopyHost
from finespun.hosts.states import check
from finespun.hosts.targets import modules

MAIN = ("inputs", "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds",
        "pixel_values", "input_features", "input_values", "sample", "hidden_states")  # fmt: skip


def enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The root begins: rows are counted, factors formed."""
    adapter_set = adapter_set_of(model)
    if not torch.compiler.is_compiling():
        adapter_set.enter()
        for adapter in _unwatched(model, adapter_set):
            if was_trainable(model, adapter) and not in_training(model):
                refuse_frozen_by_peft(model, adapter.name)
            for _, host in _places(model, adapter):
                host.ran = False
    if adapter_set.rows is not None and (x := batch(args, kwargs)) is not None:
        adapter_set.rows.check(len(x), adapter_set.several)
    for factor_cache in _factor_caches(adapter_set):
        factor_cache.enter()


def leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The root has ended, normally or by an exception (then there is no output). Returns another
    output where a backward pass is to be refused."""
    adapter_set = adapter_set_of(model)
    if not torch.compiler.is_compiling():
        adapter_set.leave()
        if output is not None:
            _watch(model, adapter_set)
    for factor_cache in _factor_caches(adapter_set):
        factor_cache.leave()
    if adapter_set.merged and output is not None and _trains_nothing(model, adapter_set):
        return tree_map(partial(_unlearnable, adapter_set), output)
    return None


def _trains_nothing(model: nn.Module, adapter_set: AdapterSet) -> bool:
    """Whether this is a training pass in which all that could be trained is merged; entries that
    are trained in place, in the weights themselves, are another matter."""
    if not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    kept = (adapter_set.kept or {}).values()
    if any(isinstance(k, Patch) and k.written is None for k in kept):
        return False
    merged = [p for n in adapter_set.merged for p in adapter_set.attached[n].parameters()]
    own = {id(p) for p in merged}
    rest = (p for p in model.parameters() if id(p) not in own)
    return any(p.requires_grad for p in merged) and not any(p.requires_grad for p in rest)


def _unlearnable(adapter_set: AdapterSet, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.requires_grad:
        return leaf
    found: Tensor = _Refusing.apply(leaf, torch.empty(0, requires_grad=True), adapter_set)  # type: ignore[no-untyped-call]
    return found


class _Refusing(torch.autograd.Function):
    """The same tensor; a backward pass through it is refused by the table of states."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, adapter_set: AdapterSet) -> Tensor:
        ctx.adapter_set = adapter_set
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        check(ctx.adapter_set, "train")
        raise StateError("this output was made while all that is trained was merged: run it again")


def batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input whose leading dimension counts the rows: by its usual name, or the first tensor."""
    named = {**kwargs, **next((a for a in args[:1] if isinstance(a, Mapping)), {})}
    usual = (named.get(name) for name in MAIN if name in named)
    for found in (*args, *usual, *named.values()):
        if isinstance(found, Tensor) and found.dim():
            return found
    return None


def _factor_caches(adapter_set: AdapterSet) -> list[FactorCache]:
    routed = () if adapter_set.rows is None else adapter_set.rows.names
    names = {n for n, _ in adapter_set.in_force()} | {n for n in routed if n is not None}
    return [f for n in names if (f := adapter_set.attached[n].factor_cache) is not None]


def _unwatched(model: nn.Module, adapter_set: AdapterSet) -> list[Attached]:
    """Active adapters whose first training pass is under way."""
    if not (model.training and torch.is_grad_enabled()):
        return []
    return [e for n, _ in adapter_set.in_force() if not (e := adapter_set.attached[n]).watched]


def _places(model: nn.Module, adapter: Attached) -> Iterator[tuple[str, Any]]:
    """Name and host of every place where the adapter acts."""
    yield from ((h.name, h) for h in all_hosts(model) if adapter.name in h.deltas())
    known = modules(model) if adapter.trained else {}
    for name in adapter.trained:
        host = known[name].__dict__.get("_finespun")
        if isinstance(host, CopyHost):
            yield name, host


def _watch(model: nn.Module, adapter_set: AdapterSet) -> None:
    """Warn, once for each adapter, of layers that the first training pass left out. Layers whose
    names differ by numbers alone count as one kind: single experts and blocks may rest."""
    for adapter in _unwatched(model, adapter_set):
        adapter.watched = True
        ran: dict[str, list[tuple[str, bool]]] = {}
        for name, host in _places(model, adapter):
            ran.setdefault(re.sub(r"\d+", "#", name), []).append((name, host.ran))
        idle = [kind[0][0] for kind in ran.values() if not any(done for _, done in kind)]
        if idle:
            shown = ", ".join(map(repr, idle[:5])) + (" and more" if len(idle) > 5 else "")
            warnings.warn(
                f"adapter {adapter.name!r} acts at {shown}, which this model did not call in its "
                "first training pass: there it has no effect. Code that multiplies by a layer's "
                "weight itself, as TRL and fused losses do at the output head, goes past adapters",
                stacklevel=3,
            )
