"""What a method wants to see of the base before training, from the first rows to train on."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from finespun import hosts
from finespun.adapter import Adapter
from finespun.contract import Scores
from finespun.driver import estimate_gradients, mean_activations, start_from_gradients
from finespun.models import Loaded
from finespun.recipes.recipe import Recipe
from finespun.tasks.batches import Batches
from finespun.tasks.task import Batch, Encoded, Task

LOOK = 128  # rows


def measured_scores(
    recipe: Recipe, task: Task[Any, Any], text: Loaded, rows: Encoded
) -> Scores | None:
    """What the structure chooses by (`Structure.wants_scores`), None where it wants nothing."""
    wanted = recipe.structure.wants_scores
    if wanted is None:
        return None
    model, names = text.model.eval(), hosts.find(text.model, recipe.targets)
    if not names:
        return {}
    batches = first_batches(recipe, task, text, rows)
    if wanted == "activations":
        return mean_activations(model, names, batches, lambda m, batch: m(**batch))
    return estimate_gradients(model, names, batches, weighed(task))


def show_gradients(
    recipe: Recipe, task: Task[Any, Any], text: Loaded, adapter: Adapter, rows: Encoded
) -> None:
    """Show every site its gradient, for structures that begin with it
    (`Structure.wants_gradient`)."""
    if recipe.structure.wants_gradient and adapter.deltas:
        model = text.model.eval()
        batches = first_batches(recipe, task, text, rows)
        start_from_gradients(model, adapter.name, batches, weighed(task))


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
