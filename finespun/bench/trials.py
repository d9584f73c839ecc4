"""One trial: a recipe and the rows it is measured on; and the file that keeps what trials found."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from finespun.errors import FileError, InputError
from finespun.recipes.recipe import Recipe
from finespun.recipes.yaml import explain
from finespun.training.progress import as_json

FILE = "results.jsonl"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """`recipe` trained whole. With `held` = (share, seed), that share of the training rows is left
    out and measured on, and the held-out rows of the task are not touched."""

    member: str
    recipe: Recipe
    held: tuple[float, int] | None = None

    def as_json(self) -> dict[str, Any]:
        """All that the result depends on: the whole recipe (where it writes to left out), the rows
        measured on, and the contents of the tables that it reads."""
        recipe = yaml.safe_load(self.recipe.dump())
        del recipe["output"]
        files = (self.recipe.data.file, self.recipe.data.test_file)
        return {
            "recipe": recipe,
            "held": None if self.held is None else list(self.held),
            "tables": [_digest(Path(file)) for file in files if file is not None],
        }

    @property
    def key(self) -> str:
        """A hash of `as_json`."""
        return hash_of(self.as_json())


def hash_of(record: Record) -> str:
    """The key of a recorded trial. Its recipe is read anew, so that options which did not exist
    when it ran count with their defaults, but a head that had no learning rate of its own with the
    updates'. Raises InputError where it cannot be read any more."""
    values = {**record["recipe"]}
    training = {**values.get("training", {})}
    training.setdefault("head_lr", training.get("lr", training.get("rate")))
    try:
        recipe = Recipe.model_validate({**values, "training": training})
    except ValidationError as error:
        raise InputError(explain(error, Recipe, {}, "recipe")) from error
    whole = yaml.safe_load(recipe.dump())
    del whole["output"]
    told = json.dumps([whole, record["held"], record["tables"]], sort_keys=True)
    return hashlib.blake2b(told.encode(), digest_size=12).hexdigest()


def _digest(path: Path) -> str:
    try:
        return hashlib.blake2b(path.expanduser().read_bytes(), digest_size=12).hexdigest()
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Outcome:
    """What a trial came to. `loss` is the mean over the rows measured on; `bytes` the size of the
    adapter's tensors in a file; a diverged trial has no metrics, and says why in `error`."""

    status: Literal["ok", "diverged"]
    metrics: Mapping[str, float]
    num_update_parameters: int
    num_module_parameters: int
    bytes: int
    seconds: float
    cpu_seconds: float
    error: str = ""

    def score(self, metric: str) -> float | None:
        """The metric, or None where the trial diverged or the metric is not a number."""
        value = self.metrics.get(metric)
        return value if value is not None and math.isfinite(value) else None


FIELDS = tuple(Outcome.__dataclass_fields__)


class Results:
    """The finished trials in `results.jsonl`: one JSON object a line, added as soon as it is known.

    A line is written by one call and reaches the disk before the next trial starts; a last line
    that was cut short by a crash is dropped. Raises FileError for any other damage.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.records: dict[str, Record] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{str(self.path)!r} cannot be read: {error}") from error
        whole, newline, rest = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                self.records[hash_of(record)] = record
            except (ValueError, KeyError, TypeError) as error:
                raise FileError(
                    f"{str(self.path)!r}, line {number} is not a trial that can be read ({error}); "
                    "repair or delete the line"
                ) from error
        if rest:
            os.truncate(self.path, len((whole + newline).encode()))

    def __len__(self) -> int:
        return len(self.records)

    def get(self, trial: Trial) -> Outcome | None:
        """What a finished trial came to, or None."""
        record = self.records.get(trial.key)
        return None if record is None else Outcome(**{name: record[name] for name in FIELDS})

    def add(self, trial: Trial, outcome: Outcome, about: Record) -> None:
        """Append one finished trial. Raises FileError if the disk refuses."""
        found = {name: getattr(outcome, name) for name in FIELDS}
        record = {"key": trial.key, "member": trial.member, **found, **about, **trial.as_json()}
        line = (as_json(record) + "\n").encode()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                written = os.write(handle, line)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise FileError(f"{str(self.path)!r} cannot be written: {error.strerror}") from error
        if written < len(line):
            raise FileError(f"{str(self.path)!r}: only {written} of {len(line)} bytes fit")
        self.records[record["key"]] = record
