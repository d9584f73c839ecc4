"""A run that is killed at any moment resumes and ends bit-equal to one that was not."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import carry_out, write_recipe

# Each run is a process forked from a server that has imported everything already.
FORKS: ForkServerContext = multiprocessing.get_context("forkserver")
BERT = "transformers.models.bert"
FORKS.set_forkserver_preload(
    ["finespun.training.run", f"{BERT}.modeling_bert", f"{BERT}.tokenization_bert_fast"]
)
STEPS = 16


def start(
    arguments: list[str], folder: Path, kill: tuple[str, int] | None = None
) -> ForkServerProcess:
    process = FORKS.Process(target=carry_out, args=(arguments, kill, str(folder / "stderr")))
    process.start()
    return process


def finish(arguments: list[str], folder: Path, kill: tuple[str, int] | None = None) -> int | None:
    process = start(arguments, folder, kill)
    process.join(120)
    return process.exitcode


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    return [(line["step"], line["loss"]) for line in told if line["event"] == "step"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert finish(["train", str(write_recipe(folder, head_lr="lr"))], folder) == 0
    return folder


@pytest.fixture
def folder(tmp_path: Path, unbroken: Path) -> Path:
    """A folder with the same model and table, and a run of its own."""
    for name in ("model", "table.csv"):
        copy = shutil.copytree if (unbroken / name).is_dir() else shutil.copy
        copy(unbroken / name, tmp_path / name)
    return tmp_path


def check_equal(folder: Path, unbroken: Path) -> None:
    ours, theirs = (load_file(f / "out" / "adapter.safetensors") for f in (folder, unbroken))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    results = [json.loads((f / "out" / "metrics.json").read_text()) for f in (folder, unbroken)]
    for key in (
        "before",
        "after",
        "steps",
        "loss",
        "num_update_parameters",
        "num_module_parameters",
    ):
        assert results[0][key] == results[1][key]
    assert losses(folder) == losses(unbroken)
    assert not (folder / "out" / "checkpoints").exists()


def test_the_unbroken_run_did_learn(unbroken: Path) -> None:
    told = losses(unbroken)
    assert [step for step, _ in told] == list(range(1, STEPS + 1))
    first, last = (sum(loss for _, loss in part) for part in (told[:8], told[8:]))
    assert last < first


# Six checkpoints are renamed into place and four deleted; then adapter.save puts the folder aside
# (11), the new one in its place (12), and deletes the old one (13).
QUICK = [
    ("step", 2),  # before the first checkpoint
    ("step", 8),  # at the end of an epoch, between checkpoints
    ("after rename", 4),  # an old checkpoint is being deleted
    ("before rename", 12),  # for a moment the output folder has no name
    ("before replace", 2),  # the model card, beside the adapter, its recipe and its figures
]
SLOW = [
    ("evaluation", 1),  # before the first step
    ("step", 13),
    ("checkpoint", 3),  # about to be written
    ("before rename", 2),  # written, but without its name
    ("after rename", 2),
    ("evaluation", 2),  # trained, but nothing saved
    ("before rename", 11),
    ("after rename", 12),
    ("before rename", 13),
    ("before replace", 1),  # recipe.yaml
    ("after replace", 2),  # all is written, without its name
]


@pytest.mark.parametrize(
    "kill", [*QUICK, *(pytest.param(kill, marks=pytest.mark.slow) for kill in SLOW)]
)
def test_killed_then_resumed(kill: tuple[str, int], folder: Path, unbroken: Path) -> None:
    arguments = ["train", str(write_recipe(folder, head_lr="lr"))]
    assert finish(arguments, folder, kill) == -signal.SIGKILL
    assert finish([*arguments, "--resume"], folder) == 0, (folder / "stderr").read_text()
    check_equal(folder, unbroken)


@pytest.mark.slow
def test_killed_again_and_again(folder: Path, unbroken: Path) -> None:
    arguments = ["train", str(write_recipe(folder, head_lr="lr"))]
    draw, deaths = random.Random(3), 0
    while finish([*arguments, "--resume"], folder, ("step", draw.randint(4, 7))) != 0:
        deaths += 1
        assert deaths < 20
    assert deaths >= 2
    check_equal(folder, unbroken)


@pytest.mark.slow
def test_killed_from_outside_at_a_random_time(folder: Path, unbroken: Path) -> None:
    arguments = ["train", str(write_recipe(folder, head_lr="lr"))]
    draw = random.Random()
    for _ in range(3):
        process = start([*arguments, "--resume"], folder)
        time.sleep(draw.uniform(0.1, 1.5))
        process.kill()
        process.join()
    assert finish([*arguments, "--resume"], folder) == 0, (folder / "stderr").read_text()
    check_equal(folder, unbroken)


def test_interrupted_then_resumed(folder: Path, unbroken: Path) -> None:
    path = write_recipe(folder, checkpoint_every=20, head_lr="lr")
    process = start(["train", str(path), "targets=[query, value]"], folder)
    log = folder / "out" / "metrics.jsonl"
    while not (log.exists() and '"step"' in log.read_text()):
        assert process.is_alive(), (folder / "stderr").read_text()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    told = (folder / "stderr").read_text()
    assert "interrupted after step" in told
    command = f"finespun train {path} 'targets=[query, value]' --resume"
    assert command in told
    assert (folder / "out" / "checkpoints").is_dir()
    again = ["train", str(path), "targets=[query, value]", "--resume"]
    assert finish(again, folder) == 0, (folder / "stderr").read_text()
    check_equal(folder, unbroken)
