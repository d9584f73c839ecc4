"""Runs trials one after the other in this process; model, data and tokens are loaded once."""

import json
import time
from typing import Any

import torch
from safetensors.torch import save

from finespun import hosts
from finespun.adapter import Adapter
from finespun.bench.trials import Outcome, Trial
from finespun.contract import Site, Structure
from finespun.errors import TrainingError
from finespun.models import Loaded
from finespun.recipes.recipe import Recipe
from finespun.tasks.task import Encoded, Split, Task
from finespun.training.look import look
from finespun.training.run import Job, attach, choose_device, limits_of, surroundings


class Workbench:
    """Trains what a trial says and measures it, bit for bit as a process of its own would.

    Between trials the adapter is detached, which gives the base back untouched; a fresh head is
    drawn while loading, so another seed loads the model anew.
    """

    def __init__(self) -> None:
        self._data: dict[str, tuple[Task[Any, Any], Split[Any]]] = {}
        self._encoded: dict[object, tuple[Encoded, Encoded]] = {}
        self._model: tuple[tuple[object, ...], Loaded] | None = None

    def run(self, trial: Trial) -> Outcome:
        """Train and measure one trial; a TrainingError becomes a diverged outcome."""
        with surroundings(trial.recipe):
            job = self.job(trial)
            try:
                return self._train(job)
            finally:
                job.adapter.detach()

    def check(self, recipe: Recipe) -> None:
        """Raise InputError where the recipe's methods cannot begin."""
        job = self.job(Trial("", recipe))
        try:
            job.check()
        finally:
            job.adapter.detach()

    def job(self, trial: Trial) -> Job:
        """The trial's model, adapted, and its rows."""
        recipe, text = trial.recipe, self.model(trial.recipe)
        train, test = self.encoded(trial, text)
        task = self.task(recipe)
        seen = look(recipe, task, text, train)
        return Job(recipe, task, text, attach(recipe, text, seen), train, test, seen)

    def _train(self, job: Job) -> Outcome:
        loop = job.loop()
        torch.manual_seed(job.recipe.training.seed)
        started, metrics, error = time.process_time(), {}, ""
        try:
            loop.run()
            job.settle()
            metrics = job.measure()
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

    def model(self, recipe: Recipe) -> Loaded:
        """The recipe's model with its fresh head; the last trial's, where that is the same."""
        task, device = self.task(recipe), choose_device(recipe.training.device)
        seed = recipe.training.seed
        key = (recipe.model, json.dumps(task.record(), sort_keys=True), seed, device)
        if self._model is None or self._model[0] != key:
            self._model = None
            found = task.load(recipe.model, seed)
            found.model.to(device)
            self._model = (key, found)
        return self._model[1]

    def task(self, recipe: Recipe) -> Task[Any, Any]:
        """What is learned, settled by the rows to train on."""
        return self._read(recipe)[0]

    def data(self, recipe: Recipe) -> Split[Any]:
        """Rows to train on and rows held out."""
        return self._read(recipe)[1]

    def _read(self, recipe: Recipe) -> tuple[Task[Any, Any], Split[Any]]:
        key = recipe.data.model_dump_json()
        if key not in self._data:
            task = recipe.data.choose()
            rows = task.read(recipe.data.source)
            self._data[key] = (task.settled(rows.train), rows)
        return self._data[key]

    def encoded(self, trial: Trial, text: Loaded) -> tuple[Encoded, Encoded]:
        """The rows to train on and those to measure on, as the model takes them."""
        recipe, limits = trial.recipe, limits_of(trial.recipe.training)
        key = (recipe.data.model_dump_json(), recipe.model, limits, trial.held)
        if key not in self._encoded:
            task, rows = self._read(recipe)
            parts = (rows.train, rows.test)
            if trial.held is not None:
                parts = task.held_out(rows.train, *trial.held)
            train, test = (task.encode(text, part, limits) for part in parts)
            self._encoded[key] = (train, test)
        return self._encoded[key]

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


def file_size(adapter: Adapter) -> int:
    """Bytes of the adapter's tensors in a safetensors file, the trained head included."""
    tensors = adapter.attached.tensors()
    return len(save({str(key): tensor.cpu().contiguous() for key, tensor in tensors.items()}))
