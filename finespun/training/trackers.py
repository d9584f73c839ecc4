"""A run followed in other programs: TensorBoard, trackio, W&B, MLflow, each an extra of its own.

metrics.jsonl is always written; a tracker receives the same values. Nothing is sent anywhere unless
the tracker's own settings (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...) ask for it.
"""

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml

from finespun.errors import InputError
from finespun.recipes.recipe import Recipe
from finespun.training.output import flat
from finespun.training.progress import Record, Reporter, worst

PROJECT = "finespun"
PARAM_LENGTH = 500  # characters that every MLflow server takes


@dataclass(frozen=True)
class Subject:
    """The run that trackers follow: its name, its output folder, and its recipe as YAML."""

    folder: Path
    recipe: str

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe as one mapping with dotted keys."""
        return flat(yaml.safe_load(self.recipe))


class Tracker(Protocol):
    """One run in another program's book; made from a `Subject`."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, at a step; steps never fall."""

    def close(self, failed: bool) -> None:
        """The run has ended, or has failed."""


class TensorBoard:
    """Event files in OUTPUT/tensorboard, for `tensorboard --logdir`."""

    def __init__(self, subject: Subject) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(subject.folder / "tensorboard"), purge_step=0)
        self.writer.add_text("recipe", f"```yaml\n{subject.recipe}```")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class Trackio:
    """A run in trackio's own database, for `trackio show`."""

    def __init__(self, subject: Subject) -> None:
        import trackio

        self.finish: Any = trackio.finish  # the run's own would be called again at exit
        with redirect_stdout(sys.stderr):
            self.run: Any = trackio.init(PROJECT, subject.name, config=subject.settings)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        with redirect_stdout(sys.stderr):
            self.finish()


class WandB:
    """A run in OUTPUT/wandb, offline unless WANDB_MODE says otherwise; `wandb sync` sends it."""

    def __init__(self, subject: Subject) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self.run: Any = wandb.init(
            project=PROJECT,
            name=subject.name,
            dir=str(subject.folder),
            config=subject.settings,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run at MLFLOW_TRACKING_URI, or in MLflow's own default place; sent in parcels."""

    PARCEL = 200  # metrics

    def __init__(self, subject: Subject) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.client, self.metric, self.waiting = MlflowClient(), Metric, list[Any]()
        experiment = self.client.get_experiment_by_name(PROJECT)
        place = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
        self.id: str = self.client.create_run(place, run_name=subject.name).info.run_id
        params = [Param(key, str(v)[:PARAM_LENGTH]) for key, v in subject.settings.items()]
        self.client.log_batch(self.id, params=params)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self.waiting += [self.metric(name, value, now, step) for name, value in values.items()]
        if len(self.waiting) >= self.PARCEL:
            self._send()

    def _send(self) -> None:
        parcel, self.waiting = self.waiting, []
        self.client.log_batch(self.id, metrics=parcel)

    def close(self, failed: bool) -> None:
        self._send()
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[Subject], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check_installed(names: Sequence[str]) -> None:
    """Raise InputError for a tracker whose package is missing, naming what installs it."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(
                f"trackers: {name} is not installed; pip install 'finespun[{name}]', "
                "or leave it out: metrics.jsonl is always written"
            )


class Followers(Reporter):
    """Hands a run's figures to its trackers. One that fails is left out with a warning: it
    must not cost the run."""

    def __init__(self, names: Sequence[str], subject: Subject) -> None:
        self.step, self.trackers = 0, dict[str, Tracker]()
        for name in names:
            try:
                self.trackers[name] = TRACKERS[name](subject)
            except Exception as error:
                self.finish(failed=True)
                raise InputError(f"trackers: {name} does not start: {error}") from error

    def tell(self, record: Record) -> None:
        self.step = record.get("step", self.step)
        values = numbers_of(record)
        if values:
            self._all(lambda tracker: tracker.scalars(values, self.step))

    def finish(self, failed: bool) -> None:
        """Close every tracker."""
        self._all(lambda tracker: tracker.close(failed))
        self.trackers.clear()

    def _all(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                call(tracker)
            except Exception as error:
                del self.trackers[name]
                warnings.warn(
                    f"tracker {name} failed and is left out from here on: {error}", stacklevel=2
                )


@contextmanager
def followed(recipe: Recipe, past: Iterable[Record] = ()) -> Iterator[Followers]:
    """The recipe's trackers, open for the length of a run; they receive the `past` events first.

    Raises InputError where one does not start.
    """
    subject = Subject(Path(recipe.output).expanduser(), recipe.dump())
    followers = Followers(recipe.trackers, subject)
    try:
        for record in past:
            followers.tell(record)
        yield followers
    except BaseException:
        followers.finish(failed=True)
        raise
    followers.finish(failed=False)


def numbers_of(record: Record) -> dict[str, float]:
    """What trackers draw of an event: finite numbers by name, none for most kinds of events."""
    match record["event"]:
        case "step":
            names = ("loss", "lr", "grad_norm", "examples_per_second")
            found = {f"train/{name}": record[name] for name in names}
        case "checkpoint":
            found = {f"update/{name}": v for name, v in worst(record["diagnostics"]).items()}
        case "evaluation":
            found = {f"held_out/{name}": v for name, v in record["metrics"].items()}
        case _:
            found = {}
    return {name: v for name, v in found.items() if v is not None and math.isfinite(v)}
