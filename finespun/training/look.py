"""What methods need to see of the base before training, from the first rows to train on."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from finespun import files, hosts
from finespun.contract.need import MEASURED
from finespun.driver import Look, measure
from finespun.driver.activations import trained_tokens
from finespun.driver.starting import FROM_FILES
from finespun.models import Loaded
from finespun.recipes.recipe import Recipe
from finespun.tasks.batches import Batches
from finespun.tasks.task import Batch, Encoded, Task

LOOK = 128  # rows


def look(recipe: Recipe, task: Task[Any, Any], text: Loaded, rows: Encoded) -> Look:
    """What the recipe's methods need to know of the base, every layer's; empty where they need
    nothing."""
    needs = recipe.needs() & MEASURED
    names = hosts.find(text.model, recipe.targets) if needs else []
    if not names:
        return Look({need: {} for need in needs})
    batches = first_batches(recipe, task, text, rows) if needs - FROM_FILES else iter(())
    loss = weighed(task)
    seen = measure(
        text.model.eval(), names, needs - FROM_FILES, batches, loss, masks=trained_tokens
    )
    if recipe.initializer is not None:
        read = files.sources(text.model, names, recipe.initializer)
        seen.found |= {need: dict(one) for need, one in read.items()}
    return seen


def first_batches(
    recipe: Recipe, task: Task[Any, Any], text: Loaded, rows: Encoded
) -> Iterator[Batch]:
    """The batches of the first `LOOK` rows, where the model is."""
    training, device = recipe.training, next(text.model.parameters()).device
    batches = Batches(task, rows, training.batch_size, seed=training.seed)
    for batch in islice(batches.epoch(), -(-LOOK // training.batch_size)):
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def weighed(task: Task[Any, Any]) -> Callable[[Any, Batch], tuple[Tensor, float]]:
    """The task's mean loss of a batch together with how much it counts."""
    return lambda model, batch: (task.loss(model, batch), task.weight(batch))
