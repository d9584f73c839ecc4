"""Recipes: what they say, what they refuse and how, overrides, and exact round trips."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finespun.errors import FileError, InputError
from finespun.methods.structures import LSR, STRUCTURES, LoRA
from finespun.recipes.recipe import Recipe
from finespun.recipes.training import HEAD_LR

TEXT = """\
model: minilm-l6
data: {builtin: trec}
structure:
  kind: lsr
  rank: 4
targets: [query, value]
training:
  epochs: 3
"""


def test_defaults_are_filled_in() -> None:
    recipe = Recipe.parse("model: m\ndata: {file: a.csv}\n")
    assert recipe.structure == LSR()
    assert (recipe.targets, recipe.train_modules, recipe.output) == ("all-linear", None, "out")
    assert (recipe.data.text, recipe.data.label, recipe.data.pair) == ("text", "label", None)
    assert (recipe.training.epochs, recipe.training.batch_size) == (3, 32)


def test_the_rate_follows_the_structure_unless_given() -> None:
    recipe = Recipe.parse(TEXT)
    assert recipe.lr == 3e-3
    assert recipe.changed(["structure={kind: lora}"]).lr == 1e-3
    assert recipe.changed(["structure={kind: c3a}"]).lr == 1.0
    assert recipe.changed(["training.lr=2e-4"]).lr == 2e-4


def test_options_reach_the_structure_under_its_own_and_pefts_names() -> None:
    recipe = Recipe.parse(TEXT, ["structure.separation_rank=8", "structure.alpha=5"])
    assert recipe.structure == LSR(rank=4, separation_rank=8, alpha=5.0)
    lora = Recipe.parse(TEXT, ["structure={kind: lora, r: 2, lora_alpha: 3, use_rslora: true}"])
    assert lora.structure == LoRA(rank=2, alpha=3.0, rslora=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("epochs", "epocs"), "x.yaml, line 8: training.epocs is not .*; nearest: 'epochs'"),
        (("targets", "target"), "x.yaml, line 6: target is not a key .*; nearest: 'targets'"),
        (("rank", "rnak"), "x.yaml, line 3: structure: lsr has no option 'rnak'; nearest: 'rank'"),
        (("lsr", "lsx"), "x.yaml, line 3: structure: no structure is called 'lsx'; nearest: 'lsr'"),
        (("kind: lsr", "seed: 1"), "line 3: structure: .* needs a kind, one of .*'lsr'"),
        (("rank: 4", "rank: four"), "x.yaml, line 5: structure.rank = 'four' .* valid integer"),
        (
            ("kind: lsr", "kind: shira\n  mask: given"),
            r"line 3: structure: shira needs a call from Python .*mask='given'; try mask='random'",
        ),
        (
            ("targets:", "allocation: {kind: merge_inject, merges: 1}\ntargets:"),
            r"line 6: allocation: merge_inject needs LoR2C of rank 2 or more, not lsr",
        ),
        (("rank: 4", "rank: -4"), "line 3: structure: rank=-4 must be at least 1"),
        (("rank: 4", "start: balancd"), "line 5: structure.start = 'balancd' .*: 'balanced'"),
        (("epochs: 3", "lr: -1"), "line 8: training.lr = -1 should be greater than 0"),
        (("epochs: 3", "lr: .nan"), "line 8: training.lr = nan should be a finite"),
        (("epochs: 3", "schedule: linar"), "line 8: training.schedule = .*nearest: 'linear'"),
        (("{builtin: trec}", "{}"), "line 2: data: needs either a file or builtin"),
        (("{builtin: trec}", "{builtin: trec, file: a}"), "data: needs either a file or builtin"),
        (
            ("{builtin: trec}", "{builtin: trec, text: q}"),
            "'trec' takes no 'text'",
        ),
        (("model: minilm-l6\n", ""), "x.yaml: model is missing"),
        (("epochs: 3", "epochs: 3\n  epochs: 4"), "line 9: training.epochs was given in line 8"),
        (("{builtin: trec}", "{builtin: trec"), r"x.yaml, line 3: not YAML"),
        (("training:\n  epochs: 3", "training: 3"), "line 7: training = 3 should be"),
    ],
)
def test_errors_name_line_key_value_and_what_would_work(change: tuple[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Recipe.parse(TEXT.replace(*change), source="x.yaml")


@pytest.mark.parametrize("text", ["", "- 1\n", "hello\n"])
def test_a_recipe_is_a_mapping(text: str) -> None:
    with pytest.raises(InputError, match="a recipe is a list of `key: value` lines"):
        Recipe.parse(text)


def test_every_wrong_key_is_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        Recipe.parse(TEXT, ["training.epochs=0", "training.batchsize=8"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert any("training.epochs = 0" in line for line in lines)
    assert any("nearest: 'batch_size'" in line for line in lines)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.lr", "not of the form section.key=value"),
        ("training..rate=1", "not of the form"),
        ("model.x=1", "model is 'minilm-l6', which has no keys"),
        ("training.lr=[", "the value is not YAML"),
        ("trainig.rate=1", "trainig is not a key of a recipe; nearest: 'training'"),
        ("structure.kind=lora", None),
    ],
)
def test_overrides_are_checked_like_the_file(override: str, says: str | None) -> None:
    if says is None:
        assert Recipe.parse(TEXT, [override]).structure == LoRA(rank=4)
        return
    with pytest.raises(InputError, match=says):
        Recipe.parse(TEXT, [override])


def test_a_number_in_an_override_may_have_an_exponent() -> None:
    for text in ("1e-3", "1E-3", "0.1e-2", ".001", "0.001"):
        assert Recipe.parse(TEXT, [f"training.lr={text}"]).lr == 1e-3


def test_an_error_from_an_override_does_not_blame_a_line() -> None:
    with pytest.raises(InputError, match=r"^x\.yaml: training\.epochs = 0"):
        Recipe.parse(TEXT, ["training.epochs=0"], source="x.yaml")


structures = st.one_of(
    st.builds(LoRA, rank=st.integers(1, 64), rslora=st.booleans()),
    st.builds(LSR, rank=st.just(6), rank_split=st.sampled_from([None, (2, 3), (1, 2, 3)])),
)
words = st.text(min_size=1, max_size=12).filter(lambda s: "\x00" not in s)


@settings(deadline=None)
@given(
    structure=structures,
    lr=st.none() | st.floats(1e-8, 10),
    column=words,
    targets=st.just("all-linear") | st.lists(words, min_size=1, max_size=3),
    train=st.none() | st.lists(words, max_size=2),
)
def test_dump_and_parse_are_inverse_to_the_byte(
    structure: Any, lr: float | None, column: str, targets: Any, train: Any
) -> None:
    recipe = Recipe.model_validate(
        {
            "model": "m",
            "data": {"file": "a.csv", "text": column},
            "structure": structure,
            "targets": targets,
            "train_modules": train,
            "training": {"lr": lr},
        }
    )
    text = recipe.dump()
    again = Recipe.parse(text)
    assert again.dump() == text
    assert (again.structure, again.lr, again.data) == (structure, recipe.lr, recipe.data)
    assert (again.targets, again.train_modules) == (recipe.targets, recipe.train_modules)


def test_a_task_recipe_round_trips_and_names_every_choice() -> None:
    recipe = Recipe.parse(TEXT)
    text = recipe.dump()
    assert Recipe.parse(text).dump() == text
    values = yaml.safe_load(text)
    assert values["data"] == {"builtin": "trec", "seed": 0}
    assert values["training"]["lr"] == 3e-3
    assert values["training"]["head_lr"] == HEAD_LR
    assert values["structure"]["separation_rank"] == 16


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ([], HEAD_LR),
        (["training.lr=0.5"], HEAD_LR),
        (["training.lr=0.5", "training.head_lr=1e-4"], 1e-4),
        (["training.lr=0.5", "training.head_lr=lr"], 0.5),
        (["training.lr=0.5", "train_modules=[classifier]"], 0.5),
    ],
)
def test_an_untrained_head_has_a_learning_rate_of_its_own(
    changes: list[str], wanted: float
) -> None:
    assert Recipe.parse(TEXT, changes).head_lr == wanted


def test_built_in_data_of_0_1_was_called_a_task() -> None:
    with pytest.warns(DeprecationWarning, match="data.builtin: trec"):
        old = Recipe.parse(TEXT.replace("builtin: trec", "task: trec"))
    assert old.dump() == Recipe.parse(TEXT).dump()


def test_changed_checks_and_leaves_the_recipe_as_it_was() -> None:
    recipe = Recipe.parse(TEXT)
    other = recipe.changed(["training.seed=7", "output=elsewhere"])
    assert (other.training.seed, other.output) == (7, "elsewhere")
    assert (recipe.training.seed, recipe.output) == (0, "out")
    with pytest.raises(InputError, match="nearest: 'seed'"):
        recipe.changed(["training.sed=7"])


def test_the_schema_knows_every_key_and_every_structure() -> None:
    schema = Recipe.json_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    kinds = {
        c["properties"]["kind"]["const"]: c for c in schema["properties"]["structure"]["oneOf"]
    }
    assert set(kinds) == set(STRUCTURES)
    assert "separation_rank" in kinds["lsr"]["properties"]
    assert kinds["lora"]["additionalProperties"] is False


def test_files_are_loaded_and_missing_ones_named(tmp_path: Path) -> None:
    (tmp_path / "trec.yaml").write_text(TEXT)
    assert Recipe.load(tmp_path / "trec.yaml", ["output=o"]).output == "o"
    with pytest.raises(FileError, match=r"nearest: 'trec\.yaml'"):
        Recipe.load(tmp_path / "trek.yaml")


@pytest.mark.parametrize("file", ["trec-lsr", "trec-lsr-small", "support"])
def test_the_examples_are_lawful(file: str) -> None:
    recipe = Recipe.load(Path(__file__).parents[2] / "examples" / f"{file}.yaml")
    assert recipe.targets == ("query", "value")
    assert isinstance(recipe.structure, LSR)
