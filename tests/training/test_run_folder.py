"""The folder a run writes: one run at a time, old work whole until the new is, nobody else's."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Events, write_recipe

from finespun.errors import FileError
from finespun.recipes.recipe import Recipe
from finespun.storage.lock import locked
from finespun.training import run as running
from finespun.training.checkpoint import checkpoints
from finespun.training.inference import Trained
from finespun.training.loop import Interrupted
from finespun.training.output import Result
from finespun.training.progress import Reporter
from finespun.training.run import run

pytestmark = pytest.mark.slow
OLD = ("adapter.safetensors", "adapter.json", "recipe.yaml", "metrics.json", "metrics.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("folder"), epochs=1)


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    return Recipe.load(folder, [f"output={tmp_path / 'out'}"])


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    run(Recipe.load(folder, [f"output={out}"]))
    return out


class Stop(Reporter):
    """Does something after step `at`."""

    def __init__(self, at: int, action: Any) -> None:
        self.at, self.action = at, action

    def tell(self, record: Any) -> None:
        if record["event"] == "step" and record["step"] == self.at:
            self.action()


def held(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OLD}


def stopped(recipe: Recipe, at: int = 5, number: int = signal.SIGTERM, **options: Any) -> None:
    with pytest.raises(Interrupted):
        run(recipe, reporter=Stop(at, lambda: signal.raise_signal(number)), **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_leave_a_checkpoint_and_the_handlers_of_before(
    number: int, recipe: Recipe
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped(recipe, number=number)
    assert checkpoints(Path(recipe.output) / "checkpoints")[-1].name == "step-000000005"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert run(recipe, resume=True).steps == 8


@pytest.mark.parametrize("at", [1, 5])
def test_old_work_is_whole_until_the_new_is(
    at: int, finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(finished, recipe.output)
    old, other = held(finished), recipe.changed(["training.seed=3"])
    stopped(other, at, overwrite=True)
    assert held(Path(recipe.output)) == old
    assert Trained.open(recipe.output).recipe.training.seed == 0
    result = run(other, resume=True)
    straight = run(other.changed([f"output={tmp_path / 'straight'}"]))
    assert result.after == straight.after
    assert Result.read(recipe.output) == result
    assert Trained.open(recipe.output).recipe.training.seed == 3
    log = (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()
    assert [e["step"] for e in map(json.loads, log) if e["event"] == "step"] == list(range(1, 9))
    assert not (Path(recipe.output) / "checkpoints").exists()


def test_a_failure_keeps_the_old_work(
    finished: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, recipe.output)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running, "_result", fail)
    with pytest.raises(FileError, match="disk is full"):
        run(recipe, overwrite=True)
    assert held(Path(recipe.output)) == held(finished)


DAMAGES = ["cut", "empty", "gone", "noise"]


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_the_last_whole_checkpoint_is_taken(kind: str, name: str, recipe: Recipe) -> None:
    stopped(recipe)
    places = checkpoints(Path(recipe.output) / "checkpoints")
    path = places[-1] / name
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-9], "noise": data[:-9] + bytes(255 - b for b in data[-9:])}.get(kind, b"")
    )
    if kind == "gone":
        path.unlink()
    events = Events()
    assert run(recipe, resume=True, reporter=events).steps == 8
    assert f"warning: {path}" in events.notes()
    assert f"resumed after step {int(places[-2].name[5:])} of 8" in events.notes()


def test_no_whole_checkpoint_names_each(recipe: Recipe) -> None:
    stopped(recipe)
    places = checkpoints(Path(recipe.output) / "checkpoints")
    for place in places:
        (place / "state.json").write_text("{")
    with pytest.raises(FileError, match="no whole checkpoint") as caught:
        run(recipe, resume=True)
    assert all(place.name in str(caught.value) for place in places)


def test_checkpoints_by_time(recipe: Recipe) -> None:
    for minutes, count in (("1e-9", 8), ("10", 3)):
        events = Events()
        changes = ["training.checkpoint_every=3", f"training.checkpoint_minutes={minutes}"]
        run(recipe.changed(changes), overwrite=True, reporter=events)
        assert [r["event"] for r in events.records].count("checkpoint") == count


def test_one_run_at_a_time(recipe: Recipe, finished: Path) -> None:
    shutil.copytree(finished, recipe.output)
    before = held(finished)
    for resume, overwrite in ((False, False), (False, True), (True, False)):
        with locked(recipe.output, "a run"), pytest.raises(FileError, match="in use by a run of"):
            run(recipe, resume, overwrite=overwrite)
    assert held(Path(recipe.output)) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["file", "folder", "hidden", "link", "system"])
def test_a_folder_with_other_peoples_work_is_left(
    what: str, overwrite: bool, recipe: Recipe
) -> None:
    folder = Path(recipe.output)
    names = {
        "file": ["thesis.tex"],
        "folder": ["photos/one"],
        "hidden": [".config"],
        "link": [],
        "system": ["passwd", "hosts", "ssl/certs/one", ".pwd.lock"],
    }[what]
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    if what == "link":
        (folder / "to").symlink_to("nowhere")
    before = {p: p.lstat() for p in (folder, *folder.rglob("*"))}
    with pytest.raises(FileError, match="which no run wrote: name a folder of its own"):
        run(recipe, overwrite=overwrite)
    assert {p: p.lstat() for p in (folder, *folder.rglob("*"))} == before


LINKED = (".", "recipe.yaml", "metrics.json", "metrics.jsonl", "checkpoints", "adapter.json")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", LINKED)
def test_nothing_is_read_or_written_through_a_link(
    name: str, resume: bool, recipe: Recipe, tmp_path: Path
) -> None:
    folder, other = Path(recipe.output), tmp_path / "other"
    if "." not in name.lstrip("."):
        other.mkdir()
    else:
        other.write_text("mine")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(other)
    with pytest.raises(FileError, match="is a link to"):
        run(recipe, resume=resume, overwrite=not resume)
    assert list(other.iterdir()) == [] if other.is_dir() else other.read_text() == "mine"
    assert os.readlink(path) == str(other)
