"""Which adapters act: the same for the whole batch, or another for each row; which may sleep."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from finespun.adapters.state import AdapterState
from finespun.errors import InputError, StateError
from finespun.hosts.adapter_set import Rows, adapter_set_of, alone
from finespun.hosts.attach import materialise, take_out, watch
from finespun.hosts.forward_hooks import batch
from finespun.hosts.stack import inside
from finespun.hosts.states import check

GENERATE = "_finespun_generate"  # where a generate of the object itself waits


@alone
def activate(model: nn.Module, wanted: str | Sequence[str] | Mapping[str, float] | None) -> None:
    """Make these adapters act, with weights where a mapping is given; None is the base alone.
    Raises StateError while another thread runs the model."""
    adapter_set = adapter_set_of(model)
    check(adapter_set, "activate")
    weights = adapter_set.weights(wanted)
    if adapter_set.merged.items() - set(weights):
        check(adapter_set, "activate", asked={"leaves merged ones out"})
    asleep = [name for name, _ in weights if name not in adapter_set.attached]
    for name, _ in weights:
        materialise(model, name)
    try:
        adapter_set.buffers.choice(name for name, _ in weights)
    except StateError:
        for name in asleep:
            take_out(model, adapter_set.attached[name])
        raise
    adapter_set.active = weights
    adapter_set.settle_buffers()


@alone
def evict(model: nn.Module, name: str) -> None:
    """Keep only the state of an inactive adapter, the one that was registered while nothing was
    trained; its modules are made anew when needed."""
    adapter_set = adapter_set_of(model)
    adapter_set.check_known(name)
    check(adapter_set, "evict", name)
    live = adapter_set.attached.get(name)
    if live is not None:
        adapter_set.states[name] = live.asleep(adapter_set.states[name]).shared()
        take_out(model, live)


def set_strength(model: nn.Module, name: str, strength: float) -> None:
    """Multiply the whole update of an adapter, live or asleep."""
    adapter_set = adapter_set_of(model)
    found = adapter_set[name]
    check(adapter_set, "strength", name)
    if isinstance(found, AdapterState):
        adapter_set.states[name] = dataclasses.replace(found, strength=strength)
    else:
        found.strength = strength


def swap(model: nn.Module, name: str, state: AdapterState) -> None:
    """Copy a state into the modules of an adapter of the same form, which keeps its name. Raises
    InputError where a tensor is missing, unknown or of another shape; nothing has changed then."""
    adapter_set = adapter_set_of(model)
    check(adapter_set, "swap", name)
    live = materialise(model, name)
    watch(model, live, state.tensors)
    live.load(state.tensors)
    adapter_set.settle_buffers()
    live.structure, live.strength = state.structure, state.strength
    live.lineage, live.base = state.lineage, state.base
    adapter_set.states[name] = state.named(name).shared()


@contextmanager
def rows(
    model: nn.Module,
    names: Sequence[str | None],
    lengths: Sequence[int] | None = None,
    repeat: int = 1,
) -> Iterator[None]:
    """Inside the block, row i of a batch uses adapter names[i], or the base where it is None.

    A batch has as many rows as there are names, or `repeat` times as many where each name serves
    that many in turn; `generate` repeats rows by itself, for beams or several answers. With
    `lengths`, names[i] serves the next lengths[i] positions of a packed batch instead. Another
    number of rows or positions raises StateError, and so does a layer that cannot distinguish them.
    """
    adapter_set = adapter_set_of(model)
    check(adapter_set, "rows")
    if isinstance(names, str) or not all(n is None or isinstance(n, str) for n in names):
        raise InputError(f"rows takes a list with a name, or None, for each row, not {names!r}")
    if lengths is not None and (len(lengths) != len(names) or min(lengths, default=1) < 0):
        raise InputError(f"{len(names)} names need as many lengths >= 0, not {list(lengths)}")
    if repeat < 1 or (lengths is not None and repeat != 1):
        raise InputError(f"repeat={repeat} must be at least 1, and 1 where lengths are given")
    with adapter_set.guard():
        check(adapter_set, "rows")
        for name in {n for n in names if n is not None}:
            materialise(model, name)
        before = adapter_set.rows

        def end() -> None:
            adapter_set.rows = before
            if all(block.kind != "rows" for block in adapter_set.blocks):
                give_generate(model)
            adapter_set.settle_buffers()

        adapter_set.buffers.of_rows(names)
        adapter_set.rows = Rows(tuple(names), None if lengths is None else tuple(lengths), repeat)
        stay = frozenset(n for n in names if n is not None)
        with inside(adapter_set.blocks, "rows", end, stay):
            take_generate(model)
            adapter_set.settle_buffers()
            yield


def take_generate(model: nn.Module) -> None:
    """From now on the model's `generate` is given the rows that are named, and repeats them."""
    inner = getattr(model, "generate", None)
    if inner is None or _ours(inner):
        return
    own = model.__dict__
    if "generate" in own:
        own[GENERATE] = own["generate"]
    own["generate"] = functools.partial(_generate, model)


def give_generate(model: nn.Module) -> None:
    """Put back what `take_generate` took."""
    own = model.__dict__
    if _ours(own.get("generate")):
        del own["generate"]
        if GENERATE in own:
            own["generate"] = own.pop(GENERATE)


def _ours(generate: Any) -> bool:
    return isinstance(generate, functools.partial) and generate.func is _generate


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    adapter_set = adapter_set_of(model)
    if adapter_set.rows is not None and (x := batch(args, kwargs)) is not None:
        adapter_set.rows.check(len(x), adapter_set.several)
    before, adapter_set.several = adapter_set.several, True
    try:
        own: Any = model.__dict__.get(GENERATE)
        inner: Any = getattr(type(model), "generate", None)
        return own(*args, **kwargs) if own else inner(model, *args, **kwargs)
    finally:
        adapter_set.several = before
