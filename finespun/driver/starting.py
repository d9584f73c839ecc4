"""A start that is written at once, when an adapter is made, and not when its training begins."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from finespun.contract import Initializer, Need
from finespun.contract.need import MEASURED
from finespun.driver.activations import trained_tokens
from finespun.driver.gradients import Loss
from finespun.driver.look import Look, Seen, measure
from finespun.driver.setup import prepare
from finespun.errors import InputError
from finespun.hosts import View, detach
from finespun.hosts.modes import evaluating
from finespun.methods.composition import suits

Read = Callable[[nn.Module, Iterable[str], Initializer], Mapping[Need, Mapping[str, Seen]]]
FROM_FILES = frozenset({Need.UPDATES, Need.WEIGHTS})


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns itself. Raises InputError where it returns none."""
    found = getattr(model(**batch) if isinstance(batch, Mapping) else model(batch), "loss", None)
    if not isinstance(found, Tensor):
        raise InputError(
            "the model returns no loss for these batches; pass loss=lambda model, batch: ..."
        )
    return found


def begin(
    model: nn.Module,
    name: str,
    initializer: Initializer,
    batches: Iterable[Any],
    loss: Loss | None,
    read: Read,
    seed: int,
) -> None:
    """`start` an adapter that was just attached: notes become warnings, and
    where it cannot start, it is taken out again."""
    try:
        told = start(model, name, initializer, batches, loss, read, seed)
    except BaseException:
        detach(model, name)
        raise
    for text in told:
        warnings.warn(text, stacklevel=4)  # the caller of adapt


def start(
    model: nn.Module,
    name: str,
    initializer: Initializer,
    batches: Iterable[Any] = (),
    loss: Loss | None = None,
    read: Read | None = None,
    seed: int = 0,
) -> list[str]:
    """Let an initializer write adapter `name` of `model`, which is active, and return notes
    on it.

    What it needs to see of the base is measured on `batches`, in eval mode, with `loss(model,
    batch)` (that which the model returns), `read` gives what it needs from files. Raises
    InputError where it needs batches and has none, and what `measure` and `prepare` raise; the
    adapter is then as it was.
    """
    if not isinstance(initializer, Initializer):
        raise InputError(f"initializer={initializer!r} must be an instance such as fs.PiSSA()")
    suits(initializer, View(model, name).structure)
    needs = initializer.needs & MEASURED
    if needs - FROM_FILES and not (batches := list(batches)):
        wanted = " and ".join(sorted(needs - FROM_FILES))
        raise InputError(f"{initializer.kind} looks at {wanted}: pass batches=[...]")
    names = list(View(model, name).deltas)
    look = Look({})
    if needs:
        with evaluating(model):
            found = loss or own_loss
            look = measure(model, names, needs, batches, found, masks=trained_tokens)
        if read is not None:
            look.found |= {need: dict(one) for need, one in read(model, names, initializer).items()}
    return [t for h in prepare(model, name, [initializer], 1, seed, look).hooks for t in h.news(0)]
