"""What a method wants to see of the base before training, from the first rows to train on."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from finespun import hosts
from finespun.adapter import Adapter
from finespun.contract import Scores
from finespun.driver import estimate_gradients, mean_activations, start_from_gradients
from finespun.models.zoo import TextModel
from finespun.recipes.recipe import Recipe
from finespun.tasks.text import Batch, Batches, Tokens, weight_of

LOOK = 128  # rows


def measured_scores(recipe: Recipe, text: TextModel, rows: Tokens) -> Scores | None:
    """What the structure chooses by (`Structure.wants_scores`), None where it wants nothing."""
    wanted = recipe.structure.wants_scores
    if wanted is None:
        return None
    model, names = text.model.eval(), hosts.find(text.model, recipe.targets)
    if not names:
        return {}
    batches = first_batches(recipe, text, rows)
    if wanted == "activations":
        return mean_activations(model, names, batches, lambda m, batch: m(**batch))
    return estimate_gradients(model, names, batches, loss)


def show_gradients(recipe: Recipe, text: TextModel, adapter: Adapter, rows: Tokens) -> None:
    """Show every site its gradient, for structures that begin with it
    (`Structure.wants_gradient`)."""
    if recipe.structure.wants_gradient and adapter.deltas:
        model = text.model.eval()
        start_from_gradients(model, adapter.name, first_batches(recipe, text, rows), loss)


def first_batches(recipe: Recipe, text: TextModel, rows: Tokens) -> Iterator[Batch]:
    """The batches of the first `LOOK` rows, where the model is."""
    training, device = recipe.training, next(text.model.parameters()).device
    batches = Batches(text.tokenizer, rows, training.batch_size, seed=training.seed)
    for batch in islice(batches.epoch(), -(-LOOK // training.batch_size)):
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def loss(model: Any, batch: Batch) -> tuple[Tensor, float]:
    """The mean loss of a batch, and how much it counts."""
    return model(**batch).loss, weight_of(batch)
