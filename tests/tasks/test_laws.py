"""The laws of every task: losses add up, nothing vanishes, and what was trained can be asked."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from suite import relative, stir
from tiny_lm import PROMPT, write_lm_recipe
from tiny_run import Events, tiny_model, tiny_recipe, tiny_table

from finespun.errors import FileError, InputError
from finespun.recipes.recipe import Recipe
from finespun.tasks import TASKS
from finespun.tasks.task import Task
from finespun.training.inference import Trained, origin
from finespun.training.run import Job, prepare, run

ROOT = Path(__file__).resolve().parents[2]
ROWS = list(range(7))


def encoder(folder: Path, data: dict[str, Any], **table: bool) -> Recipe:
    """A tiny sentence encoder's recipe on a table; nothing is drawn in its forward pass."""
    tiny_model(folder / "model", dropout=0.0)
    tiny_table(folder / "table.csv", **table)
    values = tiny_recipe(folder, epochs=1)
    return Recipe.parse(yaml.safe_dump({**values, "data": {**values["data"], **data}}))


def causal(folder: Path, **data: Any) -> Recipe:
    """A tiny language model's recipe."""
    return Recipe.load(write_lm_recipe(folder, data=data, training={"epochs": 1}))


CASES: dict[str, Callable[[Path], Recipe]] = {
    "classify": lambda f: encoder(f, {}),
    "classify pairs": lambda f: encoder(f, {"pair": "other"}, pairs=True),
    "regress": lambda f: encoder(f, {}, numbers=True),
    "regress named": lambda f: encoder(f, {"task": "regress"}, numbers=True),
    "answer": lambda f: causal(f),
    "answer in a chat": lambda f: causal(f, chat=True),
    "answer by other words": lambda f: causal(f, answers={"bad": "very bad", "good": "good"}),
}


@pytest.fixture(scope="module", params=CASES)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return CASES[request.param](tmp_path_factory.mktemp("law"))


def job_of(recipe: Recipe, pack: bool = False) -> Job:
    """The recipe's job in float64, its updates away from their start."""
    job = prepare(recipe.changed([f"training.pack={pack}"]) if pack else recipe)
    job.text.model.double().eval()
    stir(job.adapter.parameters())
    return job


def loss_of(job: Job, indices: list[int]) -> tuple[torch.Tensor, int]:
    batch = job.task.collate(job.train, indices)
    weight = job.task.weight(batch)
    moved = {k: t.double() if t.is_floating_point() else t for k, t in batch.items()}
    return job.task.loss(job.text.model, moved), weight


def test_every_task_is_tried() -> None:
    assert {name.split()[0] for name in CASES} == TASKS.keys()


# --- the loss ------------------------------------------------------------------------------------
def test_the_loss_of_a_batch_is_the_weighted_mean_of_its_rows(recipe: Recipe) -> None:
    for pack in (False, True):
        kind = recipe.data.choose().kind
        if pack and not TASKS[kind].packs:
            with pytest.raises(InputError, match=r"training\.pack"):
                recipe.changed(["training.pack=true"])
            continue
        job = job_of(recipe, pack)
        assert job.task.adds_up
        whole, weight = loss_of(job, ROWS)
        alone = [loss_of(job, [i]) for i in ROWS]
        assert weight == sum(w for _, w in alone)
        wanted = sum(loss * w for loss, w in alone) / weight
        assert float(whole.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
        parameters = [p for p in job.adapter.parameters() if p.numel()]
        for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (whole, wanted))):
            assert relative(a, b) < 1e-5


def test_every_row_trains_something_and_a_batch_counts_its_rows(recipe: Recipe) -> None:
    job = prepare(recipe)
    for i in range(len(job.train)):
        assert job.task.weight(job.task.collate(job.train, [i])) > 0
    assert job.task.count(job.task.collate(job.train, ROWS)) == len(ROWS)


# --- the rows ------------------------------------------------------------------------------------
@pytest.mark.parametrize("limits", [{}, {"train_rows": 11}, {"train_rows": 20, "test_rows": 5}])
def test_no_row_vanishes_in_silence(recipe: Recipe, limits: dict[str, int], tmp_path: Path) -> None:
    """Some rows stand twice; each is trained on, held out, repeated or not used, and counted."""
    lines = Path(str(recipe.data.file)).read_text().splitlines()
    (tmp_path / "again.csv").write_text("\n".join([*lines, *lines[1:6]]) + "\n")
    changes = [f"data.{name}={value}" for name, value in limits.items()]
    changed = recipe.changed([f"data.file={tmp_path / 'again.csv'}", *changes])
    rows = changed.data.choose().read(changed.data.source)
    assert rows.read == len(lines) + 4
    assert rows.read == len(rows.train) + len(rows.test) + rows.repeated + rows.unused
    assert rows.repeated >= 5
    assert (rows.unused > 0) == bool(limits)
    events = Events()
    prepare(changed, events)
    assert rows.report in events.notes()
    for count in (rows.read, len(rows.train), len(rows.test), rows.repeated, rows.unused):
        assert not count or str(count) in rows.report


def test_a_row_without_a_label_is_refused_by_its_number(recipe: Recipe, tmp_path: Path) -> None:
    lines = Path(str(recipe.data.file)).read_text().splitlines()
    lines[3] = lines[3].rpartition(",")[0] + ","
    (tmp_path / "gap.csv").write_text("\n".join(lines) + "\n")
    changed = recipe.changed([f"data.file={tmp_path / 'gap.csv'}"])
    with pytest.raises(InputError, match="1 rows without a label in 'label', the first is row 3"):
        prepare(changed)


def test_rows_are_their_key(recipe: Recipe) -> None:
    job, again = prepare(recipe), prepare(recipe)
    assert job.train.key == again.train.key
    order = list(range(len(job.train)))
    assert job.train.take(order).key == job.train.key
    keys = {job.train.take(some).key for some in (order, order[1:], order[::-1], [0], [1])}
    assert len(keys) == 5
    assert job.train.key != job.test.key


# --- the whole way -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def done(recipe: Recipe) -> tuple[Recipe, list[Any], dict[str, float], dict[str, float]]:
    """The finished run, and what it was asked while its files were still there: answers, metrics
    before, metrics after."""
    result = run(recipe, overwrite=True)
    trained = Trained.open(recipe.output)
    return recipe, trained.predict_file(str(recipe.data.file)), result.before, result.after


def test_the_adapter_off_is_the_model_of_before(done: Any) -> None:
    recipe, _, before, after = done
    torch.set_num_threads(recipe.training.threads)
    trained = Trained.open(recipe.output)
    assert trained.evaluate() == after
    with trained.adapter.disabled():
        assert trained.evaluate() == before
    assert trained.task.best in after
    assert trained.task.falls in after


def test_what_was_trained_can_be_asked_from_its_folder_alone(done: Any, tmp_path: Path) -> None:
    recipe, answers, *_ = done
    file = Path(str(recipe.data.file))
    moved = file.rename(file.with_suffix(".gone"))
    try:
        shutil.copytree(recipe.output, tmp_path / "whole")
        (tmp_path / "lineage").mkdir()
        for name in ("adapter.json", "adapter.safetensors"):
            shutil.copy(Path(recipe.output) / name, tmp_path / "lineage")
        asked = shutil.copy(moved, tmp_path / "table.csv")
        for folder in ("whole", "lineage"):
            trained = Trained.open(tmp_path / folder)
            assert trained.task == origin(recipe.output)[1]
            assert trained.predict_file(asked) == answers
    finally:
        moved.rename(file)


def test_a_task_is_restored_from_its_record(done: Any) -> None:
    task: Task[Any, Any] = origin(done[0].output)[1]
    record = task.record()
    again = TASKS[record.pop("kind")].from_options(**record)
    assert again == task


def test_a_damaged_record_is_a_fault_of_the_file(done: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(done[0].output, folder)
    told = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(told.replace('"task": {', '"task": {"colour": 3, '))
    with pytest.raises(FileError, match="has no option 'colour'"):
        Trained.open(folder)


# --- who asks which task it is -------------------------------------------------------------------
ASKS = re.compile(
    r"AnswerTokens|AnswerPrompt|\bClassify\b|\bRegress\b|\bTextTask\b|classes is None"
    r"|(?<!lineage)\.classes\b"
    r"|data\.prompt is|[\"'](classify|regress|classification|regression)[\"']"
)
CHOOSES = {"recipes/data.py", "models/classifier.py", "training/output.py"}


def test_nothing_above_asks_which_task_it_is() -> None:
    """Choosing it is the recipe's; transformers' own name for a head, and 0.1's files, apart."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "finespun").rglob("*.py"))
        if path.relative_to(ROOT / "finespun").parts[0] != "tasks"
        and str(path.relative_to(ROOT / "finespun")) not in CHOOSES
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if ASKS.search(line)
    ]
    assert found == []


def test_training_knows_tasks_by_their_contract_alone() -> None:
    imported = {
        name
        for folder in ("training", "bench")
        for path in (ROOT / "finespun" / folder).glob("*.py")
        for name in re.findall(r"finespun\.tasks\.(\w+)", path.read_text())
    }
    assert imported == {"task", "batches"}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"task": "classifi"}, "nearest: 'classify'"),
        ({"task": "classify", "prompt": PROMPT}, "does not go with"),
        ({"task": "answer"}, "there is none"),
        ({"prompt": PROMPT, "labels": "numbers"}, "set data.labels to classes"),
    ],
)
def test_a_task_that_does_not_go_with_its_data_is_refused(
    data: dict[str, str], told: str, tmp_path: Path
) -> None:
    values = {**tiny_recipe(tmp_path), "data": {"file": "x.csv", **data}}
    with pytest.raises(InputError, match=told):
        Recipe.parse(yaml.safe_dump(values))
