"""A run from recipe to result: what it writes, what it refuses, and that it can be used again."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import CLASSES, Events, tiny_table, write_recipe

from finespun.contract import SiteShape
from finespun.errors import FileError, FinespunError, InputError, TargetError, TrainingError
from finespun.recipes.recipe import Recipe
from finespun.storage import atomic
from finespun.training.inference import Trained
from finespun.training.look import LOOK
from finespun.training.output import Result
from finespun.training.run import prepare, run


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, Result]:
    folder = tmp_path_factory.mktemp("done")
    recipe = Recipe.load(write_recipe(folder, epochs=6))
    return folder, recipe, run(recipe)


@pytest.fixture
def recipe(tmp_path: Path, done: tuple[Path, Recipe, Result]) -> Recipe:
    """The same model and table with an output of its own."""
    return done[1].changed([f"output={tmp_path / 'out'}", "training.epochs=1"])


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


# --- what a run writes ---------------------------------------------------------------------------
def test_the_result_counts_what_the_closed_form_says(done: tuple[Path, Recipe, Result]) -> None:
    folder, recipe, result = done
    site = SiteShape("any", 16, 16)
    assert result.sites == 4
    assert result.num_update_parameters == 4 * recipe.structure.num_parameters(site)
    assert result.num_module_parameters == 16 * 2 + 2
    assert (result.train_rows, result.test_rows, result.steps) == (64, 16, 48)
    assert result.task["classes"] == list(CLASSES)
    files = [folder / "out" / name for name in ("adapter.safetensors", "adapter.json")]
    assert result.adapter_bytes == sum(f.stat().st_size for f in files)
    assert result.peak_memory > 50e6
    assert result.after["accuracy"] > result.before["accuracy"]


def test_the_folder_holds_adapter_recipe_and_metrics(done: tuple[Path, Recipe, Result]) -> None:
    folder, recipe, result = done
    names = {p.name for p in (folder / "out").iterdir()}
    written = {"adapter.safetensors", "adapter.json", "recipe.yaml", "README.md"}
    assert names == written | {"metrics.json", "metrics.jsonl"}
    assert Recipe.load(folder / "out" / "recipe.yaml").dump() == recipe.dump()
    assert Result.read(folder / "out") == result
    told = [json.loads(x) for x in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in told if r["event"] == "step"]
    assert steps == list(range(1, 49))
    kappa = [r["diagnostics"] for r in told if r["event"] == "checkpoint"]
    assert all(
        len(sites) == 4 and all(v["condition_A"] > 0 for v in sites.values()) for sites in kappa
    )
    lineage = json.loads((folder / "out" / "adapter.json").read_text())["lineage"]
    assert lineage["recipe"] == recipe.dump()
    assert lineage["metrics"] == result.after


def test_before_is_the_model_as_loaded(done: tuple[Path, Recipe, Result]) -> None:
    _, recipe, result = done
    job = prepare(recipe)
    with_adapter = job.task.predictions(job.text, job.test)
    job.adapter.detach()
    assert torch.equal(job.task.predictions(job.text, job.test), with_adapter)
    assert job.measure() == result.before


def test_the_same_recipe_gives_the_same_adapter(
    done: tuple[Path, Recipe, Result], tmp_path: Path
) -> None:
    folder, recipe, result = done
    torch.manual_seed(1234)
    again = run(recipe.changed([f"output={tmp_path / 'out'}"]))
    first, second = adapter_of(folder / "out"), adapter_of(tmp_path / "out")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (again.after, again.loss) == (result.after, result.loss)


def test_random_state_and_threads_of_the_caller_stay(recipe: Recipe) -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    run(recipe.changed(["training.threads=2"]))
    assert torch.equal(torch.rand(3), want)
    assert torch.get_num_threads() == 1


def test_a_saved_run_measures_the_same_and_predicts(done: tuple[Path, Recipe, Result]) -> None:
    folder, _, result = done
    trained = Trained.open(folder / "out")
    assert trained.evaluate() == result.after
    whole = trained.evaluate(folder / "table.csv")
    found = trained.predict_file(folder / "table.csv")
    lines = (folder / "table.csv").read_text().splitlines()[1:]
    right = [p.label == line.split(",")[1] for p, line in zip(found, lines, strict=True)]
    assert sum(right) / len(right) == whole["accuracy"]
    for item in found:
        assert sum(item.probabilities.values()) == pytest.approx(1)
        assert item.probabilities[item.label] == max(item.probabilities.values())
    texts = folder / "texts.txt"
    texts.write_text("a lovely dog\n\na grim ship\n")
    assert [p.text for p in trained.predict_file(texts)] == ["a lovely dog", "a grim ship"]
    assert trained.predict(["a lovely dog"])[0].label == trained.predict_file(texts)[0].label


def test_the_head_alone_can_be_trained(recipe: Recipe) -> None:
    result = run(recipe.changed(["targets=[]"]))
    assert (result.sites, result.num_update_parameters, result.num_module_parameters) == (0, 0, 34)
    assert Trained.open(recipe.output).evaluate() == result.after
    keys = adapter_of(Path(recipe.output)).keys()
    assert set(keys) == {"trained/classifier/weight", "trained/classifier/bias"}


def test_pairs_and_numbers(recipe: Recipe, tmp_path: Path) -> None:
    table = tiny_table(tmp_path / "pairs.csv", pairs=True, numbers=True)
    result = run(recipe.changed([f"data.file={table}", "data.pair=other"]))
    assert result.task["kind"] == "regress"
    assert result.after["mse"] > 0
    trained = Trained.open(recipe.output)
    assert trained.evaluate() == result.after
    with pytest.raises(InputError, match="trained on pairs"):
        trained.predict(["one text"])
    found = trained.predict(["one text"], ["another"])
    assert isinstance(found[0].value, float)
    assert found[0].label is None
    with pytest.raises(InputError, match="no texts"):
        trained.predict([])


def test_what_a_person_should_know_is_told(recipe: Recipe, tmp_path: Path) -> None:
    table = tiny_table(tmp_path / "table.csv")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[1], lines[2]]) + "\n")
    events = Events()
    changes = [f"data.file={table}", "training.max_length=6", "train=[]"]
    prepare(recipe.changed(changes), events)
    assert "2 dropped as repeated" in events.notes()
    assert "cut at 6 tokens" in events.notes()
    assert "classifier starts untrained and remains untrained" in events.notes()
    official = ["structure={kind: lsr, rank: 4, start: official}"]
    prepare(recipe.changed(official), events)
    assert "does not start at the base: ‖ΔW‖ up to" in events.notes()


# --- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        (["targets=[qurey]"], TargetError, ("'qurey'", "nearest: 'query'")),
        (["structure.rank=99"], InputError, ("rank=99", "16x16", "at most 16")),
        (["train=[clasifier]"], TargetError, ("'clasifier'", "nearest: 'classifier'")),
        (["data.label=lable"], InputError, ("no column 'lable'", "nearest: 'label'")),
        (["data.file=nowhere.csv"], FileError, ("no file 'nowhere.csv'",)),
        (["model=nowhere/at-all/here"], FileError, ("'nowhere/at-all/here'", "is no folder")),
        (["training.device=cudda"], InputError, ("training.device='cudda'", "try cpu")),
        (["training.max_length=2"], InputError, ("max_length = 2", "at least 3")),
        (["targets=[]", "train=[]"], TargetError, ("no layer and no module",)),
        (["data.test_share=0.999"], InputError, ("too few to hold some out",)),
    ],
)
def test_refused_before_training(
    changes: list[str], error: type[FinespunError], parts: tuple[str, ...], recipe: Recipe
) -> None:
    with pytest.raises(error) as caught:
        run(recipe.changed(changes))
    for part in parts:
        assert part in str(caught.value)
    assert not Path(recipe.output).exists()


@pytest.mark.parametrize(
    ("content", "error", "part"),
    [
        ("", FileError, "is empty"),
        ("text,label\n", FileError, "has no rows"),
        ("text,label\na,x\nb,x\nc,x\n", InputError, "all labels in 'label' are 'x'"),
        ("text,label\na,x\n,y\n", InputError, "1 rows without a text in 'text'"),
        ("text,label\na,x\nb,\n", InputError, "1 rows without a label in 'label'"),
    ],
)
def test_bad_tables(
    content: str, error: type[FinespunError], part: str, recipe: Recipe, tmp_path: Path
) -> None:
    table = tmp_path / "bad.csv"
    table.write_text(content)
    with pytest.raises(error) as caught:
        run(recipe.changed([f"data.file={table}"]))
    assert part in str(caught.value)
    assert str(table) in str(caught.value)


def test_an_output_that_cannot_be_written(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="is a file") as caught:
        run(recipe.changed([f"output={tmp_path / 'file' / 'out'}"]))
    assert str(tmp_path / "file") in str(caught.value)
    with pytest.raises(FileError, match="cannot be written"):
        run(recipe.changed(["output=/proc/nowhere"]))


def test_too_little_disk_is_told_before_training(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FileError, match=r"needs [\d,]+ bytes and the disk has 1,000 free"):
        run(recipe)
    assert not (Path(recipe.output) / "metrics.jsonl").exists()


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint finds no room; room is made, and the run goes on from the first."""
    whole = run(recipe.changed([f"output={recipe.output}-whole"]))
    mkdir, calls = os.mkdir, 0

    def full(path: Any, *rest: Any) -> None:
        nonlocal calls
        calls += "writing" in str(path)
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        mkdir(path, *rest)

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(FileError, match="the disk is full"):
        run(recipe)
    monkeypatch.setattr(os, "mkdir", mkdir)
    rest = run(recipe, resume=True)
    assert (rest.loss, rest.after) == (whole.loss, whole.after)
    first, second = adapter_of(Path(f"{recipe.output}-whole")), adapter_of(Path(recipe.output))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_rate_beyond_reason_keeps_the_checkpoint(recipe: Recipe) -> None:
    changes = ["training.lr=1e37", "training.epochs=9", "training.warmup_share=0.5"]
    with pytest.raises(TrainingError, match=r"try training\.lr=3e\+36"):
        run(recipe.changed([*changes, "training.checkpoint_every=1"]))
    assert not (Path(recipe.output) / "metrics.json").exists()


def test_a_mask_is_chosen_by_the_gradients_of_the_first_rows(recipe: Recipe) -> None:
    recipe = recipe.changed(["structure={kind: shira, rank: 1, mask: snip}"])
    job = prepare(recipe)
    model = job.text.model
    places = {n: model.get_parameter(f"{n}.weight") for n in job.adapter.deltas}
    job.loop()
    batches = list(job.batches().epoch())
    assert sum(len(batch["labels"]) for batch in batches) <= LOOK
    with job.adapter.disabled():
        for p in places.values():
            p.requires_grad_(True)
        losses = [model(**b).loss * len(b["labels"]) for b in batches]
        gradients = torch.autograd.grad(torch.stack(losses).sum(), list(places.values()))
    for (name, W), G in zip(places.items(), gradients):
        delta: Any = job.adapter.deltas[name]
        best = (W * G).abs().flatten().topk(len(delta.v)).indices
        assert set(delta.index.tolist()) == set(best.tolist())
    result = run(recipe)
    kept = adapter_of(Path(recipe.output))
    assert result.steps == 8
    for name, delta in job.adapter.deltas.items():
        assert torch.equal(kept[f"delta/{name}/entries"], delta.state_dict()["entries"])
        assert kept[f"delta/{name}/v"].abs().max() > 0
