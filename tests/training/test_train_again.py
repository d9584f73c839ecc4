"""A second run into the same folder: refused, replaced on request, or taken up where it stopped."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Events, write_recipe

import finespun as fs
from finespun.errors import FileError, InputError
from finespun.recipes.recipe import Recipe
from finespun.training import run as running
from finespun.training.inference import Trained
from finespun.training.loop import Interrupted
from finespun.training.output import Result
from finespun.training.progress import Reporter
from finespun.training.run import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("again"), epochs=1)


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    return Recipe.load(folder, [f"output={tmp_path / 'out'}"])


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def interrupted(recipe: Recipe) -> None:
    """Leave the recipe's output as Ctrl-C after step 4 does."""

    class Press(Reporter):
        def tell(self, record: Any) -> None:
            if record["event"] == "step" and record["step"] == 4:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(recipe, reporter=Press())


def test_a_finished_run_is_not_repeated(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(recipe)
    monkeypatch.setattr(running, "prepare", None)
    assert run(recipe, resume=True) == result


def test_a_finished_run_is_replaced_only_on_request(recipe: Recipe) -> None:
    first = run(recipe)
    other = recipe.changed(["training.seed=3"])
    saved = adapter_of(Path(recipe.output))
    with pytest.raises(InputError, match="holds a finished run: --overwrite replaces it"):
        run(other)
    assert Result.read(recipe.output) == first
    assert all(torch.equal(t, saved[key]) for key, t in adapter_of(Path(recipe.output)).items())
    with pytest.raises(InputError, match="choose one"):
        run(other, resume=True, overwrite=True)
    second = run(other, overwrite=True)
    assert second.loss != first.loss
    assert Result.read(recipe.output) == second


def test_an_unfinished_run_is_not_overwritten_unasked(recipe: Recipe) -> None:
    interrupted(recipe)
    with pytest.raises(InputError, match="holds an unfinished run: --resume goes on, --overwrite"):
        run(recipe)
    with pytest.raises(FileError, match="the run in it has not ended"):
        Trained.open(recipe.output)
    assert run(recipe, overwrite=True).steps == 8


@pytest.mark.parametrize("resume", [False, True])
def test_an_adapter_without_a_run_is_not_overwritten(resume: bool, recipe: Recipe) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    fs.adapt(model, fs.LoRA(rank=1), ["0"], train_modules=[]).save(recipe.output)
    with pytest.raises(InputError, match="holds an adapter: --overwrite replaces it"):
        run(recipe, resume)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_never_joins_work_of_another_kind(overwrite: bool, recipe: Recipe) -> None:
    folder = Path(recipe.output)
    files = {
        "adapter_config.json": ("{}", "holds an adapter in PEFT's format, which stays as it is"),
        "model.safetensors": ("", "holds a model, which stays as it is"),
        "config.json": ('{"model_type": "bert"}', "holds a model, which stays as it is"),
        "pytorch_lora_weights.safetensors": ("", "holds an adapter in diffusers' format, which"),
        "recipe.yaml": ("eggs: 3\n", "holds recipe.yaml but is not known as a run"),
        "metrics.json": ("{}", "holds metrics.json but is not known as a run"),
        "metrics.jsonl": ("", "holds metrics.jsonl but is not known as a run"),
        "checkpoints/mine": ("", "holds checkpoints but is not known as a run"),
        "adapter.json": ("{}", "holds adapter.json but is not known as an adapter"),
    }
    for name, (text, told) in files.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
        with pytest.raises(InputError, match=told):
            run(recipe, overwrite=overwrite)
        assert [p for p in folder.rglob("*") if p.is_file()] == [folder / name]
        shutil.rmtree(folder)


def test_texts_of_the_users_own_stay(recipe: Recipe) -> None:
    folder = Path(recipe.output)
    folder.mkdir()
    (folder / "README.md").write_text("my own words\n")
    for overwrite in (False, True):
        assert run(recipe, overwrite=overwrite).steps == 8
        assert (folder / "README.md").read_text() == "my own words\n"
    for path in folder.iterdir():
        path.unlink()
    mine = "# mine\n" + recipe.dump()
    (folder / "recipe.yaml").write_text(mine)
    with pytest.raises(InputError, match="was not written by a run: --overwrite replaces it"):
        run(recipe)
    assert (folder / "recipe.yaml").read_text() == mine
    assert run(recipe, overwrite=True).steps == 8
    assert (folder / "README.md").read_text().startswith("---")


def test_the_folder_one_is_in_is_told_before_any_work(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "prepare", None)
    with pytest.raises(FileError, match="holds the folder you are working in"):
        run(recipe.changed(["output=."]))
    assert not list(tmp_path.iterdir())


def test_a_run_that_broke_off_before_any_checkpoint_is_begun_again(recipe: Recipe) -> None:
    Path(recipe.output).mkdir()
    Path(recipe.output, "recipe.yaml").write_text(recipe.dump())
    assert run(recipe).steps == 8


def test_resuming_another_recipe_names_the_key(recipe: Recipe) -> None:
    interrupted(recipe)
    with pytest.raises(InputError) as caught:
        run(recipe.changed(["training.lr=0.5"]), resume=True)
    assert "training.lr was 0.03" in str(caught.value)
    assert "is 0.5 now" in str(caught.value)


def test_resuming_on_other_rows_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    shutil.copy(str(recipe.data.file), table)
    mine = recipe.changed([f"data.file={table}"])
    interrupted(mine)
    text = table.read_text()
    table.write_text(text.replace("dog", "cat"))
    with pytest.raises(InputError, match="the rows to train on changed since the run"):
        run(mine, resume=True)
    table.write_text(text)
    assert run(mine, resume=True).steps == 8


def test_resuming_where_nothing_began_starts(recipe: Recipe) -> None:
    assert run(recipe, resume=True).steps == 8


def test_other_threads_are_told_when_resuming(recipe: Recipe) -> None:
    free = recipe.changed(["training.threads=null"])
    interrupted(free)
    events = Events()
    torch.set_num_threads(2)
    try:
        run(free, resume=True, reporter=events)
    finally:
        torch.set_num_threads(1)
    assert "resumed after step 4 of 8; it began with 1 threads and goes on with 2" in events.notes()
