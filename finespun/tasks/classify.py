"""Classes or numbers of texts and pairs of texts: an encoder with a head."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from finespun import models
from finespun.errors import InputError
from finespun.hosts.modes import evaluating
from finespun.models import Loaded
from finespun.tasks.metrics import evaluate
from finespun.tasks.tables import LabelledTexts
from finespun.tasks.task import Answer, Batch, Limits, register
from finespun.tasks.texts import TextTask
from finespun.tasks.tokens import Tokens, pad, tokenize


@dataclass(frozen=True, kw_only=True)
class Headed(TextTask[Tokens]):
    """A task that a head on an encoder answers with `outputs` values for each text."""

    takes = "classifier"

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Outputs of the head."""

    def load(self, model: str, seed: int) -> Loaded:
        return models.load_classifier(model, self.outputs, seed=seed)

    def encode(self, loaded: Loaded, examples: LabelledTexts, limits: Limits) -> Tokens:
        return tokenize(loaded.tokenizer, examples, limits)

    def collate(self, encoded: Tokens, indices: Sequence[int]) -> Batch:
        return pad(encoded, indices)

    def predictions(self, loaded: Loaded, encoded: Tokens) -> Tensor:
        """The head's outputs for every row, (rows, outputs)."""
        batches = ((rows, self.collate(encoded, rows)) for rows in self.groups(encoded))
        return outputs_of(loaded.model, batches, len(encoded))


@register
@dataclass(frozen=True, kw_only=True)
class Classify(Headed):
    """One of `classes` for each text; None: the classes that the labels name."""

    classes: tuple[str, ...] | None = None

    kind = "classify"
    best = "accuracy"
    metrics = ("accuracy", "macro_f1")
    falls = "loss"
    labels = "classes"

    @property
    def known(self) -> tuple[str, ...] | None:
        return self.classes

    @property
    def outputs(self) -> int:
        if self.classes is None:
            raise InputError("classes are not known yet: settle the task with the rows to train on")
        return len(self.classes)

    def settled(self, examples: LabelledTexts) -> Self:
        return dataclasses.replace(self, classes=examples.classes)

    def measure(self, loaded: Loaded, encoded: Tokens) -> dict[str, float]:
        """accuracy, macro_f1, and loss: the mean cross-entropy."""
        outputs = self.predictions(loaded, encoded)
        loss = float(nn.functional.cross_entropy(outputs, encoded.labels))
        return {**evaluate(outputs, encoded.labels), "loss": loss}

    def answer(self, loaded: Loaded, inputs: LabelledTexts, limits: Limits) -> list[Answer]:
        """The likeliest class, and the softmax probability of each."""
        outputs, found = self.predictions(loaded, self.encode(loaded, inputs, limits)), []
        for text, row in zip(inputs.texts, torch.softmax(outputs.double(), dim=1).tolist()):
            probabilities = dict(zip(self.classes or (), row))
            likeliest = max(probabilities, key=probabilities.__getitem__)
            found.append(Answer(text, label=likeliest, probabilities=probabilities))
        return found


@register
@dataclass(frozen=True, kw_only=True)
class Regress(Headed):
    """A number for each text."""

    kind = "regress"
    best = "pearson"
    metrics = ("pearson", "spearman")
    falls = "mse"
    labels = "numbers"
    outputs = 1

    def measure(self, loaded: Loaded, encoded: Tokens) -> dict[str, float]:
        """mse (the loss), pearson and spearman."""
        return evaluate(self.predictions(loaded, encoded), encoded.labels)

    def answer(self, loaded: Loaded, inputs: LabelledTexts, limits: Limits) -> list[Answer]:
        """The predicted value."""
        values = self.predictions(loaded, self.encode(loaded, inputs, limits)).reshape(-1)
        return [Answer(text, value=value) for text, value in zip(inputs.texts, values.tolist())]


@torch.no_grad()
def outputs_of(
    model: nn.Module, batches: Iterable[tuple[Sequence[int], Batch]], rows: int
) -> Tensor:
    """The model's logits for every row, (rows, labels), on the CPU, in eval mode; `batches` come
    with the numbers of their rows. Raises InputError where there are none."""
    device = next(model.parameters()).device
    found: Tensor | None = None
    with evaluating(model):
        for numbers, batch in batches:
            moved = {name: t.to(device) for name, t in batch.items() if name != "labels"}
            logits = model(**moved).logits.float().cpu()
            if found is None:
                found = logits.new_empty(rows, logits.shape[-1])
            found[list(numbers)] = logits
    if found is None:
        raise InputError("no rows to evaluate")
    return found
