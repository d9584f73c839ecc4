"""Output folders of runs that 0.1 carried out, one of each of its three tasks, are asked again."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_lm import write_lm_recipe
from tiny_run import tiny_model, tiny_table

from finespun.training.inference import Trained

RUNS = Path(__file__).parent.parent / "goldens" / "run-0.1"
TEXTS = ["the cat runs fine", "a dull dog"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the runs were carried out: a folder each, with the base that the recipe names."""
    for kind in ("classify", "regress"):
        (tmp_path / kind).mkdir()
        tiny_model(tmp_path / kind / "model")
        tiny_table(tmp_path / kind / "table.csv", numbers=kind == "regress")
    (tmp_path / "answer").mkdir()
    write_lm_recipe(tmp_path / "answer")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("without", [(), ("metrics.json", "recipe.yaml")])
@pytest.mark.parametrize("kind", ["classify", "regress", "answer"])
def test_a_run_of_0_1_answers_as_it_did(kind: str, without: tuple[str, ...], place: Path) -> None:
    """From the run's files, and from what adapter.json alone says of them."""
    folder = shutil.copytree(RUNS / kind, place / kind / "out")
    for name in without:
        (folder / name).unlink()
    with pytest.warns(DeprecationWarning, match="is called 'lr' since 0.2"):
        trained = Trained.open(folder)
    assert trained.task.kind == kind
    wanted = json.loads((folder / "answers.json").read_text())
    for answer, old in zip(trained.predict(TEXTS), wanted, strict=True):
        assert (answer.text, answer.label) == (old["text"], old["label"])
        assert answer.value == pytest.approx(old["value"], abs=1e-6)
        assert answer.probabilities == pytest.approx(old["probabilities"], abs=1e-6)


@pytest.mark.parametrize("kind", ["classify", "regress", "answer"])
def test_a_run_of_0_1_measures_as_it_did(kind: str, place: Path) -> None:
    folder = shutil.copytree(RUNS / kind, place / kind / "out")
    with pytest.warns(DeprecationWarning, match="is called 'lr' since 0.2"):
        trained = Trained.open(folder)
    after = json.loads((folder / "metrics.json").read_text())["after"]
    found = trained.evaluate()
    assert {name: found[name] for name in after} == pytest.approx(after, abs=1e-6)
