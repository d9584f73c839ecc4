"""PEFT's layers in a model: recognised by their classes' home, PEFT is never imported."""

from torch import nn

from finespun.errors import InputError, StateError, TargetError
from finespun.hosts.targets import modules

HOME = "peft."


def peft_layers(model: nn.Module) -> list[str]:
    """Names of the outermost modules that PEFT put into a model, or around it ("")."""
    found: list[str] = []
    for name, module in {"": model, **modules(model)}.items():
        theirs = any(cls.__module__.startswith(HOME) for cls in type(module).__mro__)
        if theirs and not any(not one or name.startswith(f"{one}.") for one in found):
            found.append(name)
    return found


def check_model(model: nn.Module) -> None:
    """Raise InputError for what is no module, TargetError where a model holds PEFT's layers: what
    is inside them has other names in every file, and other inputs in every pass."""
    if not isinstance(model, nn.Module):
        raise InputError(f"the model comes first, an nn.Module, not a {type(model).__name__}")
    found = peft_layers(model)
    if found:
        where = f"at {found[0]!r}" if found[0] else f"around it ({type(model).__name__})"
        raise TargetError(
            f"PEFT holds this model: it has a layer of PEFT's {where}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + "; take model.merge_and_unload() or unload(), or fs.load PEFT's folder on the plain "
            "model"
        )


def refuse_frozen_by_peft(model: nn.Module, name: str) -> None:
    """Raise StateError where PEFT's layers came into a model whose adapter was in training."""
    if peft_layers(model):
        raise StateError(
            f"adapter {name!r} was frozen by PEFT, which trains only its own (get_peft_model, or "
            "TRL's peft_config): leave that out to train this one; to train PEFT's on top, load "
            "this one without trainable=True, or detach it"
        )
