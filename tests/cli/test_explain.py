"""`finespun explain` and `finespun schema`: figures against hand counts, the schema against real
recipes."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from finespun.bench import BenchSpec
from finespun.cli.app import run
from finespun.cli.explain import facts
from finespun.contract import SiteShape
from finespun.errors import InputError
from finespun.methods.structures import LSR, STRUCTURES, LoRA, VeRA
from finespun.recipes.recipe import Recipe
from finespun.recipes.yaml import read_yaml

ROOT = Path(__file__).parent.parent.parent
Captured = pytest.CaptureFixture[str]


def explained(arguments: list[str], capsys: Captured) -> dict:
    assert run(["explain", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- explain -------------------------------------------------------------------------------------
def test_numbers_and_operations_of_lora_by_hand(capsys: Captured) -> None:
    shapes = ["--shape", "3072x768", "--shape", "768x3072"]
    found = explained(["lora", "rank=4", *shapes, "--layers", "12", "--tokens", "10"], capsys)
    one = 4 * (3072 + 768)
    assert [row["num_parameters"] for row in found["shapes"]] == [12 * one] * 2
    assert [row["flops"] for row in found["shapes"]] == [12 * 2 * 10 * one] * 2
    assert [row["base_flops"] for row in found["shapes"]] == [12 * 2 * 10 * 3072 * 768] * 2
    assert found["num_parameters"] == 24 * one
    assert found["share_of_lora"] == 0.5  # rank 4 of 8
    assert found["link"] == "https://arxiv.org/abs/2106.09685"
    assert found["options"]["rank"] == 4


def test_the_text_holds_what_json_holds(capsys: Captured) -> None:
    found = explained(["lsr", "--shape", "768x768"], capsys)
    assert found["num_parameters"] == 24 * 3584
    assert run(["explain", "lsr", "--shape", "768x768"]) == 0
    shown = capsys.readouterr().out
    for part in (
        found["link"],
        found["about"],
        f"Good for: {found['good_for']}",
        f"Not for: {found['not_for']}",
        "separation_rank=16",
        "24 layers of 768 x 768: 86,016 parameters, ",
        "in all: 86,016 parameters, 29.2% of 294,912 (LoRA of rank 8)",
    ):
        assert part in shown


def test_shared_numbers_are_told_once(capsys: Captured) -> None:
    found = explained(["s2_lora", "rank=32", "--shape", "768x768"], capsys)
    assert found["shapes"][0]["num_parameters"] == 24 * 32
    assert found["num_shared_parameters"] == 32 * 2 * 768
    assert found["num_parameters"] == 24 * 32 + 32 * 2 * 768
    assert run(["explain", "s2_lora", "rank=32"]) == 0
    assert "shared by all: 49,152 parameters" in capsys.readouterr().out


@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_method_says_what_it_is_good_for_and_where_it_comes_from(
    kind: str, capsys: Captured
) -> None:
    found = explained([kind], capsys)
    assert found["good_for"], "its docstring needs a line 'Good for: ...'"
    assert found["not_for"], "its docstring needs a line 'Not for: ...'"
    assert re.match(r"https://arxiv.org/abs/\d{4}\.\d{5}$", found["link"])
    assert found["formula"]
    assert found["num_parameters"] > 0
    assert found["shapes"][0]["flops"] > 0


@given(
    st.sampled_from([LoRA(rank=3), LSR(rank=4, separation_rank=2), VeRA(rank=5)]),
    st.lists(st.tuples(st.integers(8, 90), st.integers(8, 90)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 99),
)
def test_the_whole_is_the_sum_of_its_layers(structure, shapes, layers, tokens):
    found = facts(structure, shapes, layers, tokens)
    own = [structure.num_parameters(SiteShape("any", *shape)) for shape in shapes]
    assert found["num_parameters"] == layers * sum(own) + found["num_shared_parameters"]
    flops = [structure.flops(SiteShape("any", *shape), tokens) for shape in shapes]
    assert [row["flops"] for row in found["shapes"]] == [layers * f for f in flops]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["lrs"], ("'lrs'", "'lsr'")),
        (["lsr", "rnk=3"], ("'rnk'", "'rank'")),
        (["lsr", "rank=many"], ("lsr: structure.rank = 'many'", "integer")),
        (["lsr", "rank"], ("'rank'", "section.key=value")),
        (["lsr", "rank=0"], ("rank=0", "at least 1")),
        (["lsr", "--shape", "768"], ("--shape '768'", "768x768")),
        (["lsr", "--shape", "0x3"], ("--shape '0x3'", "768x768")),
        (["lora", "rank=9", "--shape", "8x64"], ("rank=9", "8x64", "at most 8")),
        (["gralora", "--shape", "9x9"], ("does not divide", "nearest that does")),
        (["lora", "--layers", "0"], ("--layers", "0")),
    ],
)
def test_what_was_typed_wrong(
    arguments: list[str], parts: tuple[str, ...], capsys: Captured
) -> None:
    assert run(["explain", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    for part in parts:
        assert part in shown, shown


# --- schema --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["schema"]) == 0
    schema = json.loads(out.getvalue())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").glob("*.yaml"))
    if "members" not in yaml.safe_load(path.read_text())
]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_recipes_pass_as_written_and_written_out(path, validator):
    assert validator.is_valid(read_yaml(path.read_text(), path.name)[0])
    assert validator.is_valid(yaml.safe_load(Recipe.load(path).dump()))


def test_every_method_passes_with_all_its_options(validator):
    for kind, cls in STRUCTURES.items():
        structure = {"kind": kind, **cls().options()}
        recipe = {"model": "m", "data": {"builtin": "trec"}, "structure": structure}
        errors = [error.message for error in validator.iter_errors(recipe)]
        assert not errors, (kind, errors)


@pytest.mark.parametrize(
    "wrong",
    [
        {"trainin": {}},
        {"training": {"epochs": -1}},
        {"structure": {"kind": "lrs"}},
        {"structure": {"kind": "lsr", "rnk": 3}},
        {"structure": {"rank": 3}},
        {"structure": {"kind": "lsr", "start": "warm"}},
        {"data": {"tsak": "trec"}},
        {"targets": 3},
    ],
    ids=str,
)
def test_mistakes_do_not_pass(wrong, validator):
    right = {"model": "m", "data": {"builtin": "trec"}}
    assert validator.is_valid(right)
    assert not validator.is_valid({**right, **wrong})


def test_a_schema_file_is_written_once(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "recipe.schema.json"
    assert run(["schema", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} written\n"
    assert json.loads(out.read_text())["title"] == "Recipe"
    assert run(["schema", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(["schema", "--out", str(out), "--overwrite"]) == 0


@pytest.fixture(scope="module")
def bench_schema() -> Draft202012Validator:
    schema = BenchSpec.json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def bench_files() -> list[Path]:
    return [p for p in sorted((ROOT / "examples").glob("*.yaml")) if "members:" in p.read_text()]


def test_bench_files_fit_their_schema(bench_schema: Draft202012Validator) -> None:
    assert len(bench_files()) >= 3
    for file in bench_files():
        BenchSpec.load(file)
        assert list(bench_schema.iter_errors(read_yaml(file.read_text(), file.name)[0])) == []


@pytest.mark.parametrize(
    "change",
    [
        {"rtes": [1e-3, 1e-2, 1e-1]},
        {"lrs": {"low": 1e-3, "high": 1e-1}},
        {"lrs": [0, 1, 2]},
        {"members": [{"structure": {"kind": "lrs"}}]},
        {"members": [{"structure": {"kind": "lora", "rnk": 3}}]},
        {"recipe": {"model": "minilm-l3", "data": {"builtin": "trec"}, "output": "out"}},
        {"recipe": {"model": "minilm-l3", "data": {"builtin": "trec"}, "training": {"lr": 1.0}}},
        {"recipe": {"model": "minilm-l3", "data": {"builtin": "trec"}, "trackers": ["wandb"]}},
    ],
)
def test_what_a_bench_refuses_its_schema_refuses(
    change: dict[str, Any], bench_schema: Draft202012Validator
) -> None:
    whole = {
        "recipe": {"model": "minilm-l3", "data": {"builtin": "trec"}},
        "members": [{"structure": {"kind": "lora"}}],
        "lrs": {"low": 1e-3, "high": 1e-1, "count": 3},
    }
    assert bench_schema.is_valid(whole)
    BenchSpec.model_validate(whole)
    assert not bench_schema.is_valid({**whole, **change})
    with pytest.raises((InputError, ValidationError)):
        BenchSpec.model_validate({**whole, **change})
