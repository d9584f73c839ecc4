"""`finespun train --dry-run`: exact counts against the run itself, memory against what a run holds,
and nothing left behind."""

import json
from pathlib import Path

import pytest
import torch
from tiers import sampled
from tiny_lm import write_lm_recipe
from tiny_run import held_by_a_run, write_recipe
from torch.utils.flop_counter import FlopCounterMode

from finespun.cli.app import run
from finespun.errors import TargetError
from finespun.kernels.entries import Entries, entries_linear
from finespun.methods.structures import LoRA
from finespun.recipes.recipe import Recipe
from finespun.tasks.task import Limits
from finespun.tasks.tokens import Tokens
from finespun.training.estimate import Held, estimate, tried
from finespun.training.loop import Loop
from finespun.training.output import Result
from finespun.training.run import Job, prepare

pytestmark = pytest.mark.slow

FACTOR = 1.1  # the memory of a run lies within this factor of its estimate, both ways
GROWN = 1.25  # the same where the estimate is made from small batches

CHANGES = [
    [],
    ["training.batch_size=32"],
    ["training.batch_size=1"],
    ["training.accumulate=2", "training.max_length=8"],
    ["targets=[]"],
    ["targets=all-linear", "structure={kind: lora, rank: 8}"],
    ["structure={kind: hira, rank: 8}"],
    ["structure={kind: vera, rank: 8}"],
    ["structure={kind: unilora, rank: 4, size: 64}"],
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("estimate"), epochs=1)


@pytest.mark.parametrize(
    "changes", sampled(CHANGES, 0.2, name=lambda changes: " ".join(changes) or "as it is")
)
def test_a_run_holds_the_memory_that_was_estimated(changes: list[str], file: Path) -> None:
    recipe = Recipe.load(file, changes)
    found = estimate(recipe)
    ratio = (found.activations + found.optimiser) / held_by_a_run(recipe)
    assert 1 / FACTOR < ratio < FACTOR, ratio


def test_small_batches_tell_of_a_large_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load(file, ["training.batch_size=32"])
    monkeypatch.setattr("finespun.training.estimate.WHOLE", 0)
    found = estimate(recipe)
    ratio = (found.activations + found.optimiser) / held_by_a_run(recipe)
    assert 1 / GROWN < ratio < GROWN, ratio


LANGUAGE = [
    [],
    ["training.pack=true"],
    ["training.batch_size=24", "structure={kind: lsr, rank: 4}"],
]


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lm_recipe(tmp_path_factory.mktemp("language"), training={"epochs": 1})


@pytest.mark.parametrize("changes", LANGUAGE, ids=lambda changes: " ".join(changes) or "as it is")
def test_language_models_hold_what_was_estimated(changes: list[str], asking: Path) -> None:
    recipe = Recipe.load(asking, changes)
    found = estimate(recipe)
    ratio = (found.activations + found.optimiser) / held_by_a_run(recipe)
    assert 1 / FACTOR < ratio < FACTOR, ratio


@pytest.mark.parametrize("changes", LANGUAGE, ids=lambda changes: " ".join(changes) or "as it is")
def test_a_step_has_as_many_tokens_as_its_batches(changes: list[str], asking: Path) -> None:
    recipe = Recipe.load(asking, [*changes, "training.accumulate=2"])
    found, loop = estimate(recipe), prepare(recipe).loop()
    tokens = sum(batch["input_ids"].numel() for batch in loop.batches.epoch())
    assert found.steps == loop.steps
    assert found.tokens == round(tokens / loop.steps_per_epoch)


@pytest.mark.parametrize("pack", ["true", "false"])
def test_small_batches_tell_of_a_long_row(
    pack: str, asking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of attention grows with the square of a packed row."""
    recipe = Recipe.load(asking, ["training.batch_size=32", f"training.pack={pack}"])
    whole = estimate(recipe).activations
    monkeypatch.setattr("finespun.training.estimate.WHOLE", 0)
    assert 1 / GROWN < estimate(recipe).activations / whole < GROWN


# --- what is exact -------------------------------------------------------------------------------
def test_counts_are_those_of_the_run(file: Path, tmp_path: Path) -> None:
    changes = [f"output={tmp_path / 'out'}", "training.accumulate=3", "training.epochs=2"]
    recipe = Recipe.load(file, changes)
    found = estimate(recipe)
    assert run(["train", str(file), *changes, "-q"]) == 0
    result = Result.read(tmp_path / "out")
    assert len(found.targets) == result.sites
    assert found.num_update_parameters == result.num_update_parameters
    assert found.num_module_parameters == result.num_module_parameters
    assert found.adapter_bytes == (tmp_path / "out" / "adapter.safetensors").stat().st_size
    assert (found.train_rows, found.test_rows) == (result.train_rows, result.test_rows)
    assert found.steps == result.steps
    assert found.optimiser == 3 * 4 * (result.num_update_parameters + result.num_module_parameters)
    assert found.modules == ("classifier",)


def test_weights_are_all_tensors_of_the_model(file: Path) -> None:
    recipe = Recipe.load(file)
    job = prepare(recipe)
    model = job.adapter.model
    base = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    own = {id(p) for p in model.parameters()}
    added = sum(p.nbytes for p in job.adapter.parameters() if id(p) not in own)
    assert estimate(recipe).weights == base + added


def test_operations_of_a_head_alone_by_hand(file: Path) -> None:
    """Without targets the encoder goes forwards once, and backwards only the head."""
    recipe = Recipe.load(file, ["targets=[]", "training.batch_size=64"])
    found = estimate(recipe)
    assert found.update_flops == 0
    job = prepare(recipe)
    batch = next(iter(job.loop().batches.epoch()))
    job.text.model.train()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        job.text.model(**batch)
    forward = counter.get_total_flops() / batch["input_ids"].numel() * found.tokens
    assert forward < found.flops < 1.1 * forward


def test_operations_of_the_updates_come_from_the_structure(file: Path) -> None:
    found = estimate(Recipe.load(file, ["structure={kind: lora, rank: 4}"]))
    assert (
        found.update_flops == 2 * found.tokens * LoRA(rank=4).num_parameters(found.targets[0]) * 4
    )


# --- time ----------------------------------------------------------------------------------------
class Ticks:
    """A clock that stands still but for what is added to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


TIMES = [
    (["data.test_share=0.4", "training.eval_batch_size=8"], 1),
    (["training.accumulate=2", "training.epochs=3"], 1),
    (["training.batch_size=32"], 1),
    (["training.batch_size=1"], 1),
    (["training.batch_size=32"], 0),
]


@pytest.mark.parametrize(("changes", "whole"), TIMES, ids=str)
def test_time_is_that_of_all_batches(
    changes: list[str], whole: int, asking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that moves by a token a second in training, by a row in measuring."""
    clock, take, measured = Ticks(), Loop.take, Job.measure
    monkeypatch.setattr("finespun.training.estimate.WHOLE", whole << 30)

    def timed(loop: Loop, group: list[dict[str, torch.Tensor]]) -> None:
        take(loop, group)
        clock.now += sum(batch["input_ids"].numel() for batch in group)

    def counted(job: Job) -> dict[str, float]:
        clock.now += len(job.test)
        return measured(job)

    monkeypatch.setattr(Loop, "take", timed)
    monkeypatch.setattr(Job, "measure", counted)
    monkeypatch.setattr("finespun.training.estimate.PATIENCE", 1e9)
    monkeypatch.setattr("finespun.training.estimate.MOST", 1e9)
    recipe = Recipe.load(asking, changes)
    found, loop = estimate(recipe, clock=clock), prepare(recipe).loop()
    tokens = sum(batch["input_ids"].numel() for batch in loop.batches.epoch())
    assert found.seconds == pytest.approx(tokens * recipe.training.epochs, rel=1e-3)
    assert found.measuring == pytest.approx(2 * found.test_rows, rel=0.3)


@pytest.mark.parametrize(("each", "calls"), [(10.0, 2), (1.0, 4), (0.5, 6), (0.0, 10)])
def test_as_many_batches_are_tried_as_there_is_patience_for(each: float, calls: int) -> None:
    """The smallest, the middle one and pairs around it."""
    rows = tuple({"input_ids": [0] * (i + 1)} for i in range(101))
    tokens, seen = Tokens(Limits(128), 0, rows, torch.zeros(101), None), []

    def seconds(rows: list[int]) -> float:
        seen.append(rows[0])
        return each * (rows[0] + 1) / 51

    assert tried(tokens, [[i] for i in range(101)][::-1], seconds) == pytest.approx(each * 101)
    assert len(seen) == calls
    assert seen[:2] == [0, 50]
    assert tried(tokens, [[3]], lambda rows: 7.0) == 7.0


def test_compressed_rows_are_memory_too() -> None:
    """The gradient of few entries is made as compressed rows."""
    x, v = torch.ones(3, 20), torch.ones(4, requires_grad=True)
    at = Entries(torch.tensor([0, 22, 41, 399]), (20, 20))
    with Held([x, v]) as held:
        y = entries_linear(x, v, at)
        forward = held.now
        (gradient,) = torch.autograd.grad(y.sum(), v)
    assert gradient.tolist() == [3.0] * 4
    assert forward >= y.nbytes
    assert held.now >= forward + gradient.nbytes


def test_what_is_looked_at_before_training_is_part_of_it(file: Path) -> None:
    """Masks that want gradients are chosen first, else no batch could be tried."""
    found = estimate(Recipe.load(file, ["structure={kind: shira, rank: 1, mask: snip}"]))
    assert found.seconds > 0


# --- the command ---------------------------------------------------------------------------------
def test_a_dry_run_leaves_nothing_behind(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(file.parent.rglob("*"))
    state = torch.random.get_rng_state()
    assert run(["train", str(file), "--dry-run"]) == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sorted(file.parent.rglob("*")) == before
    shown = capsys.readouterr().out
    for part in (
        "4 layers: query, value (16 x 16)",
        "trained whole       classifier",
        "34 in modules",
        "64 to train on, 16 held out",
        "memory, about",
        "for 8 steps, ",
        "to measure before and after",
    ):
        assert part in shown


def test_a_dry_run_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(file), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [target["out_features"] for target in found["targets"]] == [16] * 4
    assert found["memory"] == found["weights"] + found["activations"] + found["optimiser"]
    assert found["steps"] == 8
    assert found["seconds"] > 0
    assert found["measuring"] > 0


def test_a_dry_run_refuses_what_a_run_refuses(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TargetError, match="qurey"):
        estimate(Recipe.load(file, ["targets=[qurey]"]))
    assert run(["train", str(file), "--dry-run", "targets=[qurey]"]) == 2
    assert "'query'" in capsys.readouterr().err
    assert run(["train", str(file), "--dry-run", "--resume"]) == 2
    assert "leave out --resume" in capsys.readouterr().err
