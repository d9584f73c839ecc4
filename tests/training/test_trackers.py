"""Trackers: the parameters of metrics.jsonl arrive in each, and no tracker can cost a run.

TensorBoard and W&B are the real ones, W&B offline; trackio and MLflow are stand-ins that take what
the real ones take (both were run against the real ones by hand; their ranges exclude our pins).
"""

import json
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import write_recipe

from finespun.bench import BenchSpec
from finespun.errors import InputError
from finespun.recipes.recipe import Recipe
from finespun.training import trackers
from finespun.training.estimate import estimate
from finespun.training.loop import Interrupted
from finespun.training.progress import Reporter
from finespun.training.run import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackers")
    write_recipe(folder, epochs=1)
    return folder


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    return Recipe.load(folder / "run.yaml", [f"output={tmp_path / 'out'}"])


def losses(output: Path) -> list[tuple[int, float]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"]) for r in told if r["event"] == "step"]


def drawn(output: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(output / "tensorboard")).Reload()


def parts_of(data: bytes) -> Iterator[bytes]:
    """The records of W&B's offline file: a head of 7 bytes, then blocks of 32 KiB that hold
    records of checksum (4 bytes), length (2), kind (1: whole) and content."""
    at = 7
    while at + 7 <= len(data):
        size, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1, "a record over two blocks"
        yield data[at + 7 : at + 7 + size]
        at += 7 + size


def history(data: bytes) -> dict[str, Any]:
    """Name -> value of a record that holds a step; nothing for others."""
    from wandb.proto.wandb_internal_pb2 import Record

    record = Record()
    record.ParseFromString(data)
    items = record.history.item
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


class Book:
    """A stand-in for a tracker: keeps what it hears, and fails from the step `fails` on."""

    def __init__(self, subject: trackers.Subject, fails: float = float("inf")) -> None:
        self.subject, self.fails = subject, fails
        self.told: list[tuple[int, dict[str, float]]] = []
        self.failed: bool | None = None

    def scalars(self, values: dict[str, float], step: int) -> None:
        if step >= self.fails:
            raise ConnectionError("the line is dead")
        self.told.append((step, dict(values)))

    def close(self, failed: bool) -> None:
        self.failed = failed


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> list[Book]:
    """Every tensorboard that is opened is a Book in this list."""
    opened: list[Book] = []

    def open_one(subject: trackers.Subject) -> Book:
        opened.append(Book(subject))
        return opened[-1]

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", open_one)
    return opened


# --- the real ones -------------------------------------------------------------------------------
def test_tensorboard_draws_what_the_log_holds(recipe: Recipe) -> None:
    result = run(recipe.changed(["trackers=[tensorboard]"]))
    found, output = drawn(Path(recipe.output)), Path(recipe.output)
    shown = [(e.step, e.value) for e in found.Scalars("train/loss")]
    assert shown == losses(output)
    held = found.Scalars("held_out/accuracy")
    assert [e.step for e in held] == [0, 8]
    ends = [result.before["accuracy"], result.after["accuracy"]]
    assert [e.value for e in held] == pytest.approx(ends, rel=1e-6)
    assert [e.step for e in found.Scalars("update/condition_A")] == [3, 6, 8]
    text = found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert recipe.changed(["trackers=[tensorboard]"]).dump() in text


@pytest.mark.slow
def test_wandb_stays_offline_and_keeps_every_step(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run(recipe.changed(["trackers=[wandb]"]))
    [file] = Path(recipe.output).glob("wandb/offline-run-*/*.wandb")
    rows = [row for row in map(history, parts_of(file.read_bytes())) if row]
    told = [(row["_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert told == losses(Path(recipe.output))
    assert capsys.readouterr().out == ""


# --- all of them ---------------------------------------------------------------------------------
def test_a_tracker_changes_nothing_in_the_adapter(
    recipe: Recipe, books: list[Book], tmp_path: Path
) -> None:
    run(recipe)
    run(recipe.changed([f"output={tmp_path / 'followed'}", "trackers=[tensorboard]"]))
    plain, followed = (
        load_file(tmp_path / name / "adapter.safetensors") for name in ("out", "followed")
    )
    assert all(torch.equal(plain[key], followed[key]) for key in plain)
    [book] = books
    assert book.failed is False
    assert book.subject.name == "followed"
    assert book.subject.settings["training.epochs"] == 1
    assert [step for step, _ in book.told] == sorted(step for step, _ in book.told)


def test_a_tracker_that_fails_midway_is_left_out_and_the_run_is_finished(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda subject: Book(subject, fails=4))
    with pytest.warns(UserWarning, match="tracker tensorboard failed .*: the line is dead") as seen:
        result = run(recipe.changed(["trackers=[tensorboard]"]))
    assert len([w for w in seen if "tracker" in str(w.message)]) == 1
    assert result.steps == 8
    assert (Path(recipe.output) / "metrics.json").exists()


def test_a_tracker_that_does_not_start_is_told_before_training(
    recipe: Recipe, books: list[Book], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(subject: trackers.Subject) -> Book:
        raise OSError("no such server")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", refuses)
    with pytest.raises(InputError, match="trackers: wandb does not start: no such server"):
        run(recipe.changed(["trackers=[tensorboard, wandb]"]))
    assert books[0].failed is True
    assert losses_told(Path(recipe.output)) == 0


def losses_told(output: Path) -> int:
    log = output / "metrics.jsonl"
    return len(losses(output)) if log.exists() else 0


def test_after_an_interruption_trackers_hear_the_whole_run(
    recipe: Recipe, books: list[Book]
) -> None:
    class Press(Reporter):
        def tell(self, record: Any) -> None:
            if record["event"] == "step" and record["step"] == 4:
                raise Interrupted(4)

    with pytest.raises(Interrupted):
        run(recipe, reporter=Press())
    run(recipe.changed(["trackers=[tensorboard]"]), resume=True)
    steps = [(step, v["train/loss"]) for step, v in books[-1].told if "train/loss" in v]
    assert steps == losses(Path(recipe.output))
    assert [step for step, _ in steps] == list(range(1, 9))
    assert books[-1].told[0][0] == 0  # the metrics before training


def test_a_run_that_breaks_off_closes_its_trackers_as_failed(
    recipe: Recipe, books: list[Book]
) -> None:
    class Press(Reporter):
        def tell(self, record: Any) -> None:
            if record["event"] == "step":
                raise Interrupted(1)

    with pytest.raises(Interrupted):
        run(recipe.changed(["trackers=[tensorboard]"]), reporter=Press())
    assert books[0].failed is True


# --- stand-ins with the signatures of the real ones ----------------------------------------------
def test_trackio_hears_steps_and_prints_nothing_on_stdout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []

    class Run:
        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            told.append((metrics, step))

    def init(project: str, name: str | None = None, *, config: dict[str, Any]) -> Run:
        print("* Trackio project initialized")
        told.append((project, name, config["a"]))
        return Run()

    module = types.ModuleType("trackio")
    module.init = init  # type: ignore[attr-defined]
    module.finish = lambda: print("* Run finished")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    tracker = trackers.Trackio(trackers.Subject(tmp_path / "trec", "a: 1\n"))
    tracker.scalars({"train/loss": 0.5}, 3)
    tracker.close(failed=False)
    assert told == [("finespun", "trec", 1), ({"train/loss": 0.5}, 3)]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("failed", [False, True])
def test_mlflow_hears_parcels(
    failed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[Any] = []

    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return f"experiment {name}"

        def create_run(self, experiment_id: str, run_name: str) -> Any:
            sent.append((experiment_id, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="7"))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            sent.append((run_id, list(metrics), list(params)))

        def set_terminated(self, run_id: str, status: str) -> None:
            sent.append((run_id, status))

    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    module.MlflowClient = Client  # type: ignore[attr-defined]
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)  # type: ignore[attr-defined]
    entities.Param = lambda key, value: (key, value)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    tracker = trackers.MLflow(trackers.Subject(tmp_path / "trec", f"a: {'x' * 900}\n"))
    for step in range(201):
        tracker.scalars({"train/loss": 0.5}, step)
    tracker.close(failed)
    parcels = [len(item[1]) for item in sent if len(item) == 3]
    assert sent[0] == ("experiment finespun", "trec")
    assert sent[1] == ("7", [], [("a", "x" * 500)])
    assert parcels == [0, 200, 1]
    assert sent[-1] == ("7", "FAILED" if failed else "FINISHED")


# --- recipes -------------------------------------------------------------------------------------
def test_an_unknown_tracker_is_an_error_of_the_recipe(folder: Path) -> None:
    with pytest.raises(InputError, match="'tensorbord' is not known; nearest: 'tensorboard'"):
        Recipe.load(folder / "run.yaml", ["trackers=[tensorbord]"])


@pytest.mark.parametrize("way", [run, estimate])
def test_a_tracker_that_is_not_installed_names_the_command(
    way: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"mlflow is not installed; pip install 'finespun\[mlflow"):
        way(recipe.changed(["trackers=[mlflow]"]))
    assert not Path(recipe.output).exists()


def test_trackers_are_no_part_of_what_makes_the_result(recipe: Recipe, books: list[Book]) -> None:
    assert "\ntrackers:" not in recipe.dump()
    followed = recipe.changed(["trackers=[tensorboard]"])
    assert Recipe.parse(followed.dump()).trackers == ("tensorboard",)
    assert run(followed) == run(recipe, resume=True)


def test_a_bench_has_no_trackers(folder: Path) -> None:
    text = (folder / "run.yaml").read_text()
    recipe = {**yaml.safe_load(text), "trackers": ["wandb"]}
    del recipe["output"], recipe["structure"], recipe["training"]["lr"]
    members = [{"structure": {"kind": "lora", "rank": 1}}]
    with pytest.raises(InputError, match="recipe must not set trackers"):
        BenchSpec.parse(yaml.safe_dump({"recipe": recipe, "members": members}))
