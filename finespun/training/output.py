"""The output folder of a run: what is in it, who may take it over, and its result."""

import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from finespun.adapter import Adapter
from finespun.errors import FileError, InputError
from finespun.files import refuse_to_lose
from finespun.recipes.recipe import Recipe
from finespun.storage.atomic import (
    check_own_folder,
    check_writable,
    located,
    recover,
    unfinished,
    write_file,
)
from finespun.storage.safe_io import read_json
from finespun.training.checkpoint import checkpoints
from finespun.training.progress import as_json

RECIPE, RESULT, LOG, CHECKPOINT = "recipe.yaml", "metrics.json", "metrics.jsonl", "checkpoints"
ADAPTER = ("adapter.safetensors", "adapter.json")
OWN = (
    RECIPE,
    RESULT,
    LOG,
    CHECKPOINT,
    *ADAPTER,
    "README.md",
    "report.html",
    "tensorboard",
    "wandb",
)
HIDDEN = (".gitignore", ".gitkeep", ".DS_Store")  # no work of anybody's
OLD_KEYS = {"update_numbers": "num_update_parameters", "module_numbers": "num_module_parameters"}
FREE = {"output", "trackers"}  # keys that may change when a run goes on


@dataclass(frozen=True)
class Result:
    """What a run came to.

    `before` and `after` are metrics on the held-out rows: of the model as loaded, its fresh head
    untrained, and of the adapted model. `num_update_parameters` are trained in the layers,
    `num_module_parameters` in modules trained whole (the head). `adapter_bytes`: on disk. `loss`:
    mean of the last epoch. `seconds`: spent in training steps. `peak_memory`: bytes, of the
    whole process. `task`: its kind and options, settled.
    """

    output: str
    before: dict[str, float]
    after: dict[str, float]
    sites: int
    num_update_parameters: int
    num_module_parameters: int
    adapter_bytes: int
    train_rows: int
    test_rows: int
    steps: int
    loss: float
    seconds: float
    peak_memory: int
    threads: int
    task: dict[str, Any]

    def as_json(self) -> str:
        """The text of metrics.json."""
        return as_json(dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The result of a finished run in `folder`. Raises FileError where there is none."""
        path = Path(folder) / RESULT
        if not path.exists():
            why = "the run in it has not ended" if (path.parent / RECIPE).exists() else "no run"
            raise FileError(f"{str(path)!r} does not exist: {why}")
        try:
            found = cls(**from_0_1(read_json(path)))
        except TypeError as error:
            raise FileError(f"{str(path)!r} cannot be read: {error}") from error
        for name in ("before", "after", "task"):
            if not isinstance(getattr(found, name), dict):
                raise FileError(f"{str(path)!r}: {name} must be an object")
        return found


def from_0_1(values: dict[str, Any]) -> dict[str, Any]:
    """The keys that metrics.json has now; 0.1 kept a task's classes alone, None for numbers."""
    found = {OLD_KEYS.get(key, key): value for key, value in values.items()}
    if "classes" in found and "task" not in found:
        classes = found.pop("classes")
        found["task"] = {"kind": "regress"} if classes is None else {"classes": classes}
    return found


def claim(
    folder: Path, recipe: Recipe, resume: bool = False, overwrite: bool = False
) -> Result | None:
    """Look at the output folder before anything is loaded; no work in it is lost.

    Returns the result if the run to resume has ended already. Raises FileError if the folder cannot
    be written, InputError if it holds a run or an adapter that would be lost, work of another kind,
    or another recipe's.
    """
    if resume and overwrite:
        raise InputError("resume goes on with a run and overwrite starts anew: choose one")
    recover(folder)
    room = room_of(folder)
    began, ended = (room / RECIPE).exists(), (room / RESULT).exists()
    if not (resume and began):
        refuse_to_lose(folder, "run", overwrite=True)
        refuse_strangers(folder)
        if not overwrite:
            refuse_to_replace(folder, ended)
        return None
    check_same(recipe, room / RECIPE)
    if not ended:
        return None
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)  # left by a crash after the last write
    return Result.read(folder)


def refuse_to_replace(folder: Path, ended: bool) -> None:
    """Raise InputError naming what a new run would take the place of: a run, an adapter or a
    recipe that somebody wrote."""
    another = "--overwrite replaces it, output=FOLDER keeps both"
    if ended:
        raise InputError(
            f"{str(folder)!r} holds a finished run: {another}; --resume prints its result"
        )
    if checkpoints(folder / CHECKPOINT):
        raise InputError(f"{str(folder)!r} holds an unfinished run: --resume goes on, {another}")
    if any((folder / name).exists() for name in ADAPTER):
        raise InputError(f"{str(folder)!r} holds an adapter: {another}")
    path = folder / RECIPE
    if path.exists() and Recipe.load(path).dump() != path.read_text(encoding="utf-8"):
        raise InputError(f"{str(path)!r} was not written by a run: {another}")


def check_same(recipe: Recipe, path: Path) -> None:
    """Raise InputError naming the first key in which `recipe` differs from the one saved."""
    began = flat(yaml.safe_load(Recipe.load(path).dump()))
    now = flat(yaml.safe_load(recipe.dump()))
    for key in sorted((began.keys() | now.keys()) - FREE):
        if began.get(key) != now.get(key):
            raise InputError(
                f"{key} was {began.get(key)!r} when the run in {str(path.parent)!r} began and is "
                f"{now.get(key)!r} now: resume with {str(path)!r}, or choose another output"
            )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def begin(folder: Path, recipe: Recipe) -> None:
    """A new run takes over the folder. An older adapter or result stays whole, with its recipe and
    log, until the new one is saved: what the new run writes lies in checkpoints/ till then."""
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    if any((folder / name).exists() for name in (*ADAPTER, RESULT)):
        write_file(folder / CHECKPOINT / RECIPE, recipe.dump())
    else:
        (folder / LOG).unlink(missing_ok=True)
        write_file(folder / RECIPE, recipe.dump())


def room_of(folder: Path) -> Path:
    """Where the recipe and the log of the last run in `folder` lie: in it, or in its checkpoints/
    as long as that run has not ended and an older one stands in the folder."""
    inner = folder / CHECKPOINT
    return inner if (inner / RECIPE).exists() else folder


def check_place(folder: Path, output: str) -> None:
    """Raise FileError where no run may write: without permission, through a link, over the folder
    that one works in."""
    check_own_folder(located(folder))
    for path in (folder, *(folder / name for name in OWN)):
        if path.is_symlink():
            raise FileError(
                f"{str(path)!r} is a link to {os.readlink(path)!r}, and no run writes through one: "
                "name the folder itself"
            )
    try:
        check_writable(folder / RECIPE)
    except OSError as error:
        raise FileError(
            f"output={output!r} cannot be written ({error.strerror}); name another folder"
        ) from error


def refuse_strangers(folder: Path) -> None:
    """Raise FileError for a folder that holds no run of ours and something that no run left."""
    if not folder.is_dir() or (folder / RECIPE).exists() or checkpoints(folder / CHECKPOINT):
        return
    found = {p.name for p in folder.iterdir() if not unfinished(p.name)}
    strangers = sorted(found - {*OWN, *HIDDEN})
    if strangers:
        more = f" and {len(strangers) - 1} more" if strangers[1:] else ""
        raise FileError(
            f"{str(folder)!r} holds {strangers[0]!r}{more}, which no run wrote: name a folder of "
            f"its own, such as {str(folder / 'run')!r}"
        )


def disk_needed(adapter: Adapter) -> int:
    """Bytes of the adapter and of two checkpoints (parameters and two moments each), and 1 MiB."""
    tensors = adapter.attached.tensors().values()
    return 7 * sum(t.numel() * t.element_size() for t in tensors) + (1 << 20)


if sys.platform == "win32":

    def peak_memory() -> int:
        """Most bytes of memory that this process has held; not known on Windows: 0."""
        return 0

else:
    import resource

    def peak_memory() -> int:
        """Most bytes of memory that this process has held."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
