"""Runs trials one after the other in this process; model, data and tokens are loaded once."""

import time

import torch
from safetensors.torch import save
from torch import nn

from finespun import hosts
from finespun.adapter import Adapter
from finespun.bench.trials import Outcome, Trial
from finespun.contract import Site, Structure
from finespun.errors import TrainingError
from finespun.models.zoo import TextModel, load_text_model
from finespun.recipes.recipe import Data, Recipe
from finespun.tasks.metrics import evaluate
from finespun.tasks.tables import Examples, split
from finespun.tasks.text import Tokens, tokenize
from finespun.training.run import Job, attach, choose_device, load_data, surroundings


class Workbench:
    """Trains what a trial says and measures it, bit for bit as a process of its own would.

    Between trials the adapter is detached, which gives the base back untouched; a fresh head is
    drawn while loading, so another seed loads the model anew.
    """

    def __init__(self) -> None:
        self._data: dict[Data, tuple[Examples, Examples]] = {}
        self._tokens: dict[tuple[Data, str, int, tuple[float, int] | None], list[Tokens]] = {}
        self._model: tuple[tuple[object, ...], TextModel] | None = None

    def run(self, trial: Trial) -> Outcome:
        """Train and measure one trial; a TrainingError becomes a diverged outcome."""
        recipe = trial.recipe
        text = self.model(recipe)
        train, test = self.tokens(trial, text)
        with surroundings(recipe):
            adapter = attach(recipe, text, train)
            try:
                return self._train(Job(recipe, text, adapter, train, test, None))
            finally:
                adapter.detach()

    def check(self, recipe: Recipe) -> None:
        """Raise InputError where the recipe's allocation cannot begin."""
        text = self.model(recipe)
        train, test = self.tokens(Trial("", recipe), text)
        adapter = attach(recipe, text, train)
        try:
            Job(recipe, text, adapter, train, test, None).check()
        finally:
            adapter.detach()

    def _train(self, job: Job) -> Outcome:
        loop = job.loop()
        torch.manual_seed(job.recipe.training.seed)
        started, metrics, error = time.process_time(), {}, ""
        try:
            loop.run()
            job.settle()
            outputs = job.predictions()
            metrics = evaluate(outputs, job.test.labels)
            metrics["loss"] = loss(outputs, job.test.labels)
        except TrainingError as failure:
            error = str(failure)
        return Outcome(
            status="diverged" if error else "ok",
            metrics=metrics,
            num_update_parameters=job.adapter.num_update_parameters,
            num_module_parameters=job.adapter.num_module_parameters,
            bytes=file_size(job.adapter),
            seconds=round(loop.seconds, 3),
            cpu_seconds=round(time.process_time() - started, 3),
            error=error,
        )

    def model(self, recipe: Recipe) -> TextModel:
        """The recipe's model with its fresh head; the last trial's, where that is the same."""
        train, _ = self.data(recipe.data)
        device = choose_device(recipe.training.device)
        key = (recipe.model, train.task, train.num_labels, recipe.training.seed, device)
        if self._model is None or self._model[0] != key:
            self._model = None
            found = load_text_model(
                recipe.model, train.task, train.num_labels, seed=recipe.training.seed
            )
            found.model.to(device)
            self._model = (key, found)
        return self._model[1]

    def data(self, data: Data) -> tuple[Examples, Examples]:
        """Rows to train on and rows held out."""
        if data not in self._data:
            found = load_data(data)
            self._data[data] = (found.train, found.test)
        return self._data[data]

    def tokens(self, trial: Trial, text: TextModel) -> list[Tokens]:
        """Tokens of the rows to train on and of those to measure on."""
        recipe, length = trial.recipe, trial.recipe.training.max_length
        key = (recipe.data, recipe.model, length, trial.held)
        if key not in self._tokens:
            train, test = self.data(recipe.data)
            if trial.held is not None:
                train, test = split(train, *trial.held)
            self._tokens[key] = [tokenize(text.tokenizer, part, length) for part in (train, test)]
        return self._tokens[key]

    def sites(self, recipe: Recipe, structure: Structure) -> list[Site]:
        """The layers that the recipe's targets mean, nothing attached."""
        text = self.model(recipe)
        trained = text.fresh if recipe.train_modules is None else recipe.train_modules
        names = [
            name
            for name in hosts.find(text.model, recipe.targets)
            if not any(name == t or name.startswith(t + ".") for t in trained)
        ]
        return list(hosts.sites(text.model, names, structure).values())


def loss(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean cross-entropy of logits (rows, classes), or mean squared error of values (rows, 1)."""
    if outputs.shape[-1] == 1:
        return float(nn.functional.mse_loss(outputs.squeeze(-1), labels))
    return float(nn.functional.cross_entropy(outputs, labels))


def file_size(adapter: Adapter) -> int:
    """Bytes of the adapter's tensors in a safetensors file, the trained head included."""
    tensors = hosts.tensors_of(adapter.entry)
    return len(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
