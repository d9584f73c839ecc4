"""A finished run taken up again: measure it, or ask it about new texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from finespun.adapter import Adapter, load
from finespun.errors import FileError, InputError
from finespun.files import read_adapter
from finespun.models import Loaded
from finespun.recipes.recipe import Recipe
from finespun.recipes.yaml import MOST_BYTES
from finespun.storage.safe_io import read_bytes
from finespun.tasks.task import Answer, Task
from finespun.training.output import RECIPE, Result
from finespun.training.run import choose_device, limits_of


@dataclass(frozen=True)
class Trained:
    """A model with the adapter of a finished run, or with what that was converted to, and the task
    that it learned."""

    recipe: Recipe
    task: Task[Any, Any]
    text: Loaded
    adapter: Adapter

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Load the base model that the recipe names, and the adapter in `folder`: the output of a
        run, or a folder that was made of one by `convert` or `export`.

        Raises FileError where there is no adapter, or nothing records which recipe made it.
        """
        recipe, task = origin(folder)
        model = task.load(recipe.model, recipe.training.seed)
        model.model.to(choose_device(recipe.training.device))
        return cls(recipe, task, model, load(model.model, folder))

    def evaluate(self, file: str | Path | None = None) -> dict[str, float]:
        """Metrics on the recipe's held-out rows, or on all rows of another table with the same
        columns."""
        if file is None:
            examples = self.task.read(self.recipe.data.source).test
        else:
            examples = self.task.read_labelled(file)
        limits = limits_of(self.recipe.training)
        return self.task.measure(self.text, self.task.encode(self.text, examples, limits))

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Answer]:
        """One answer for each text; a language model that has too many answers to weigh says its
        own. Raises InputError for no texts, or pairs that are missing or not asked for."""
        return self._answers(self.task.inputs(texts, pairs))

    def predict_file(self, file: str | Path) -> list[Answer]:
        """`predict` for a table with the recipe's text columns, or a .txt file, a text a line."""
        return self._answers(self.task.read_inputs(file))

    def _answers(self, inputs: Any) -> list[Answer]:
        return self.task.answer(self.text, inputs, limits_of(self.recipe.training))


def origin(folder: str | Path) -> tuple[Recipe, Task[Any, Any]]:
    """The recipe behind the adapter in a folder, and the task that it learned: from the run's own
    files, else from the adapter's lineage. Raises FileError."""
    if (Path(folder) / RECIPE).exists():
        record = Result.read(folder).task
        return settled(read_recipe(folder), record, folder)
    try:
        line = read_adapter(folder).state.lineage
    except FileError as error:
        raise FileError(f"{error}; nor is there a run: {RECIPE} is missing") from error
    if line is None or line.recipe is None:
        raise FileError(
            f"{str(folder)!r} does not say which recipe made it: name the output folder of a run, "
            "or what finespun convert or export made of one"
        )
    recipe = Recipe.parse(line.recipe, source=f"the recipe in {str(folder)!r}")
    return settled(recipe, line.task, folder)


def settled(
    recipe: Recipe, record: Mapping[str, Any], folder: str | Path
) -> tuple[Recipe, Task[Any, Any]]:
    """The recipe and its task as it was recorded; without a record the rows settle it."""
    if not record:
        task = recipe.data.choose()
        return recipe, task.settled(task.read(recipe.data.source).train)
    try:
        return recipe, recipe.data.choose(record)
    except InputError as error:
        raise FileError(f"the task recorded in {str(folder)!r}: {error}") from error


def read_recipe(folder: str | Path) -> Recipe:
    """The recipe that a run left in a folder. Raises FileError unless a regular file holds it."""
    path = Path(folder) / RECIPE
    try:
        return Recipe.parse(read_bytes(path, MOST_BYTES).decode(), source=str(path))
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is no text: {error}") from error
