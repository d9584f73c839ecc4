"""A model's own methods while it has adapters: what is kept aside goes where the model goes, to
another dtype or device, and what `save_pretrained` writes has plain keys.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finespun.hosts.adapter_set import Kept, Patch, adapter_set_of
from finespun.hosts.plain import plain_state

APPLY = "_apply"  # torch's one method behind `to`, `half`, `cuda` and their like
SAVE = "save_pretrained"


def follow(model: nn.Module) -> None:
    """From now on `model.to(...)` reaches what a merge or training has put aside, and
    `model.save_pretrained(...)` writes plain keys."""
    own = model.__dict__
    own[APPLY] = functools.partial(_apply, model)
    if SAVE not in own and hasattr(type(model), SAVE):
        own[SAVE] = functools.partial(_save, model)


def leave_alone(model: nn.Module) -> None:
    """Put back what `follow` took."""
    own = model.__dict__
    own.pop(APPLY, None)
    if getattr(own.get(SAVE), "func", None) is _save:
        del own[SAVE]


def _apply(model: nn.Module, change: Callable[[Tensor], Tensor], *args: Any, **more: Any) -> Any:
    found = type(model)._apply(model, change, *args, **more)
    adapter_set = adapter_set_of(model)
    with torch.no_grad():
        adapter_set.buffers.convert(change)
        aside = [held for block in adapter_set.blocks for held in block.aside]
        for held in {id(h): h for h in (adapter_set.kept or {}, *aside)}.values():
            held.update({name: _changed(kept, change) for name, kept in held.items()})
    return found


def _changed(kept: Kept, change: Callable[[Tensor], Tensor]) -> Kept:
    if isinstance(kept, Patch):
        written = None if kept.written is None else change(kept.written)
        return Patch(change(kept.index), change(kept.values), written)
    return change(kept[0]), None if kept[1] is None else change(kept[1])


def _save(model: nn.Module, *args: Any, **options: Any) -> Any:
    """The class's own `save_pretrained`, whatever else it is given, of the plain state."""
    write: Any = getattr(type(model), SAVE)
    if len(args) > 2 or options.get("state_dict") is not None:
        return write(model, *args, **options)
    adapter_set = adapter_set_of(model)
    left = [name for name, _ in adapter_set.active if name not in adapter_set.merged]
    if left:
        warnings.warn(
            f"save_pretrained writes the base without {', '.join(map(repr, left))}: "
            "adapter.save() writes an adapter, adapter.bake() puts it into the model first",
            stacklevel=3,
        )
    state = plain_state(model)
    model.__dict__["state_dict"] = lambda *_, **__: state
    try:
        return write(model, *args, **options)
    finally:
        del model.__dict__["state_dict"]
