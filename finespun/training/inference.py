"""A finished run taken up again: measure it, or ask it about new texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from finespun.adapter import Adapter, load
from finespun.errors import FileError, InputError
from finespun.files import read_adapter
from finespun.models.zoo import Task, TextModel
from finespun.recipes.recipe import Recipe
from finespun.recipes.yaml import MOST_BYTES
from finespun.storage.safe_io import read_bytes
from finespun.tasks.lm import answer, answer_rows
from finespun.tasks.lm_measure import measure
from finespun.tasks.metrics import evaluate
from finespun.tasks.tables import Columns, Examples, LabelKind, read_examples, read_texts
from finespun.tasks.text import in_order, tokenize
from finespun.training.loop import outputs_of
from finespun.training.output import RECIPE, Result
from finespun.training.run import choose_device, load_data, load_model


@dataclass(frozen=True)
class Prediction:
    """For classes: the likeliest one and the softmax probability of each. For a number: `value`.
    For words of a language model's own: they are the `label`, and no probability is known."""

    text: str
    value: float | None
    label: str | None
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Trained:
    """A model with the adapter of a finished run, or with what that was converted to; `classes`
    are None where numbers are predicted."""

    recipe: Recipe
    classes: list[str] | None
    text: TextModel
    adapter: Adapter

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Load the base model that the recipe names, and the adapter in `folder`: the output of a
        run, or a folder that was made of one by `convert` or `export`.

        Raises FileError where there is no adapter, or nothing tells which recipe made it.
        """
        recipe, classes = origin(folder)
        task: Task = "regression" if classes is None else "classification"
        model = load_model(recipe, task, len(classes or [""]))
        model.model.to(choose_device(recipe.training.device))
        return cls(recipe, classes, model, load(model.model, folder))

    @property
    def columns(self) -> Columns:
        """The recipe's columns."""
        data = self.recipe.data
        return Columns(data.text, data.label, data.pair)

    def evaluate(self, file: str | Path | None = None) -> dict[str, float]:
        """Metrics on the recipe's held-out rows, or on all rows of another table with the same
        columns."""
        if file is None:
            examples = load_data(self.recipe.data).test
        else:
            classes = None if self.classes is None else tuple(self.classes)
            kind: LabelKind = "numbers" if classes is None else "classes"
            examples = read_examples(file, self.columns, kind, classes)
        if self.recipe.data.prompt is not None:
            rows = answer_rows(self.recipe, self.text, examples)
            return measure(self.text.model, rows, self.text.tokenizer.pad_token_id)
        return evaluate(self._outputs(examples), examples.label_tensor())

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """One prediction for each text; a language model that has too many answers to weigh says
        its own. Raises InputError for no texts, or pairs that are missing or not asked for."""
        if not texts:
            raise InputError("no texts to predict")
        for number, row in enumerate(zip(texts, pairs or texts, strict=False), start=1):
            if not all(part.strip() for part in row):
                raise InputError(f"text {number} of {len(texts)} is blank: leave it out")
        if (pairs is None) != (self.recipe.data.pair is None):
            raise InputError(
                "this adapter was trained on "
                + ("single texts" if self.recipe.data.pair is None else "pairs of texts")
            )
        classes = self.classes
        second = None if pairs is None else tuple(pairs)
        if self.recipe.data.prompt is not None:
            asked = Examples(tuple(texts), second, (0,) * len(texts), tuple(classes or ()))
            answered = answer(self.recipe, self.text, asked)
            return [Prediction(t, None, said, shares) for t, (said, shares) in zip(texts, answered)]
        outputs = self._outputs(Examples(tuple(texts), second, (0.0,) * len(texts), None))
        if classes is None:
            values = outputs.reshape(-1).tolist()
            return [Prediction(t, v, None, {}) for t, v in zip(texts, values)]
        found = []
        for text, row in zip(texts, torch.softmax(outputs.double(), dim=1).tolist()):
            probabilities = dict(zip(classes, row))
            likeliest = max(probabilities, key=probabilities.__getitem__)
            found.append(Prediction(text, None, likeliest, probabilities))
        return found

    def predict_file(self, file: str | Path) -> list[Prediction]:
        """`predict` for a table with the recipe's text columns, or a .txt file, a text a line."""
        if Path(file).suffix == ".txt":
            return self.predict(read_lines(file))
        return self.predict(*read_texts(file, self.columns))

    def _outputs(self, examples: Examples) -> torch.Tensor:
        training = self.recipe.training
        tokens = tokenize(self.text.tokenizer, examples, training.max_length)
        batches = in_order(self.text.tokenizer, tokens, training.eval_batch_size)
        return outputs_of(self.text.model, batches, len(tokens))


def origin(folder: str | Path) -> tuple[Recipe, list[str] | None]:
    """The recipe behind the adapter in a folder, and the classes that its head tells apart: from
    the run's own files, else from the adapter's lineage. Raises FileError."""
    if (Path(folder) / RECIPE).exists():
        result = Result.read(folder)
        return read_recipe(folder), result.classes
    try:
        line = read_adapter(folder).lineage
    except FileError as error:
        raise FileError(f"{error}; nor is there a run: {RECIPE} is missing") from error
    if line is None or line.recipe is None:
        raise FileError(
            f"{str(folder)!r} does not say which recipe made it: name the output folder of a run, "
            "or what finespun convert or export made of one"
        )
    recipe = Recipe.parse(line.recipe, source=f"the recipe in {str(folder)!r}")
    if line.classes is not None:
        return recipe, list(line.classes)
    held_out = load_data(recipe.data).train.classes
    return recipe, None if held_out is None else list(held_out)


def read_recipe(folder: str | Path) -> Recipe:
    """The recipe that a run left in a folder. Raises FileError unless a regular file holds it."""
    path = Path(folder) / RECIPE
    try:
        return Recipe.parse(read_bytes(path, MOST_BYTES).decode(), source=str(path))
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is no text: {error}") from error


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank. Raises FileError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{str(path)!r} cannot be read: {error}") from error
    return [line for line in lines if line.strip()]
