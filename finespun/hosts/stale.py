"""An optimiser that was made before an adapter: it holds what is frozen now, and trains nothing."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from finespun.errors import TrainingError

_FROZEN = WeakIdKeyDictionary()  # parameter -> the adapter that froze it
_WATCH: list[Any] = []


def note_frozen(parameter: nn.Parameter, name: str) -> None:
    """Adapter `name` froze a parameter: from now on a step of an optimiser that holds frozen
    parameters alone, this one among them, raises TrainingError."""
    _FROZEN[parameter] = name
    if not _WATCH:
        # Torch's hook on all optimisers: the one that is wrong was made where nobody could see it.
        _WATCH.append(register_optimizer_step_pre_hook(_check))


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.requires_grad for p in held):
        return
    names = {_FROZEN[p] for p in held if p in _FROZEN}
    if names:
        raise TrainingError(
            f"this {type(optimizer).__name__} trains nothing: its {len(held)} parameter tensors "
            f"were frozen for adapter {', '.join(map(repr, sorted(names)))} after it was made; "
            "make it again, of adapter.parameters()"
        )
