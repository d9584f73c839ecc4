"""A value that is registered on an axis is offered wherever methods are."""

import json
import subprocess
import sys

import make_index
import pytest
import yaml
from tiny_run import write_recipe

import finespun as fs
from finespun.bench.spec import BenchSpec, Member
from finespun.cli.app import run as command
from finespun.contract.method import REGISTRY
from finespun.errors import InputError
from finespun.methods.axes import AXES
from finespun.methods.composition import offers
from finespun.methods.index import NAMES
from finespun.recipes.recipe import Recipe
from finespun.training.run import run

RECIPE = "model: m\ndata: {task: trec}\n"
OTHERS = [name for name in AXES if name != "structure"]


@pytest.fixture(autouse=True)
def toys():
    """The toy values, for the length of a test."""
    for axis in AXES.values():
        assert axis.known is not None
    kept = {name: dict(known) for name, known in REGISTRY.items()}
    sys.modules.pop("toy_axes", None)
    import toy_axes

    yield toy_axes
    for name, known in REGISTRY.items():
        known.clear()
        known.update(kept.get(name, {}))


@pytest.mark.parametrize("axis", AXES)
def test_a_value_from_outside_is_offered_everywhere(axis, capsys):
    kind = f"toy_{axis}"
    value = fs.make(kind, axis=axis)
    option, default = next(
        (n, v) for n, v in value.options().items() if n not in ("dropout", "seed")
    )
    recipe = Recipe.parse(f"{RECIPE}{axis}: {{kind: {kind}}}\n")
    assert getattr(recipe, axis) == value
    assert yaml.safe_load(recipe.dump())[axis] == {"kind": kind, **value.options()}
    assert Recipe.parse(recipe.dump()) == Recipe.parse(Recipe.parse(recipe.dump()).dump())
    for schema in (Recipe.json_schema(), BenchSpec.json_schema()["$defs"]["Member"]):
        kinds = [c.get("properties", {}) for c in schema["properties"][axis]["oneOf"]]
        [mine] = [c for c in kinds if c.get("kind") == {"const": kind}]
        assert option in mine
    member = Member.model_validate({"structure": {"kind": "lora"}, axis: {"kind": kind}})
    assert getattr(member, axis) == value
    assert command(["methods", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[kind]["axis"] == axis
    assert command(["methods", kind]) == 0
    assert f"{option}: {json.dumps(default)}" in capsys.readouterr().out
    with pytest.raises(InputError, match=rf"{axis}: .*{kind}s?'.*nearest.*'{kind}'"):
        Recipe.parse(f"{RECIPE}{axis}: {{kind: {kind}s}}\n")


def test_nothing_is_written_where_nothing_is_chosen():
    assert not set(OTHERS) & set(yaml.safe_load(Recipe.parse(RECIPE).dump()))


def test_a_run_calls_the_hooks_of_every_value_in_order(toys, tmp_path):
    changes = [f"{axis}={{kind: toy_{axis}}}" for axis in AXES]
    recipe = Recipe.load(write_recipe(tmp_path), changes)
    result = run(recipe)
    kinds = [f"toy_{axis}" for axis in OTHERS]
    assert toys.CALLS[:4] == [f"{kind} prepare" for kind in kinds]
    steps = toys.CALLS[4:]
    assert steps == [f"{kind} after_step" for _ in range(result.steps) for kind in kinds]


def test_what_does_not_go_together_is_told_with_what_would():
    text = f"{RECIPE}structure: {{kind: hira}}\ndynamics: {{kind: toy_dynamics, factors: true}}\n"
    with pytest.raises(InputError) as told:
        Recipe.parse(text)
    message = str(told.value)
    assert "line 4: dynamics: toy_dynamics needs factors, which hira does not have" in message
    assert "try factors=False" in message
    assert Recipe.parse(text.replace("hira", "lora")).dynamics.factors
    assert "lora" in message.rpartition(": ")[2]


@pytest.mark.parametrize("kind", sorted(AXES["structure"].known))
def test_what_a_structure_offers_is_what_its_updates_have(kind):
    found = offers(fs.make(kind))
    assert found <= {"factors", "gates", "products", "two sides"}
    paired = {"block_lora", "dora", "gralora", "hira", "krona", "loha", "lokr", "lor2c", "lora"}
    assert ("products" in found) == (kind in paired | {"lsr", "melora"})


# --- names ---------------------------------------------------------------------------------------
def test_the_index_is_fresh():
    assert make_index.INDEX.read_text(encoding="utf-8") == make_index.text(), (
        "run python tests/make_index.py"
    )


def test_the_index_names_what_is_registered():
    found = {
        cls.__name__: cls.__module__
        for axis in AXES.values()
        for cls in axis.known.values()
        if cls.__module__.startswith("finespun.")
    }
    assert found == NAMES
    kinds = [kind for axis in AXES.values() for kind in axis.known]
    assert len(set(kinds)) == len(kinds)
    assert not {"axis", "kind"} & {
        o for a in AXES.values() for c in a.known.values() for o in c().options()
    }


@pytest.mark.slow
def test_a_method_is_imported_from_its_own_file_alone():
    code = (
        "import sys, finespun as fs; assert 'torch' not in sys.modules; fs.GraLoRA; "
        "print([m for m in sys.modules if m.startswith('finespun.methods.structures.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['finespun.methods.structures.gralora']"
