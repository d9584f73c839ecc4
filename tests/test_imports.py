"""`import finespun` stays light: torch, numpy, safetensors and little more."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import finespun
from finespun.methods.index import NAMES

HEAVY = ("transformers", "peft", "pydantic", "yaml", "typer", "rich", "scipy", "sklearn", "polars")


def modules_after(statement):
    """Names of all modules that a fresh interpreter holds after the statement."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


@pytest.mark.slow
def test_a_name_is_loaded_when_it_is_asked_for():
    assert "torch" not in modules_after("import finespun")
    assert "torch" in modules_after("import finespun; finespun.LSR")
    assert "finespun.hosts" in modules_after("import finespun; finespun.hosts.find")


@pytest.mark.slow
def test_no_folder_hides_a_function():
    for statement in (
        "import finespun.lifecycle.conversion.facts",
        "from finespun.lifecycle.conversion import Converted",
    ):
        named = "import finespun as fs; assert fs.convert.__name__ == 'convert'"
        modules_after(f"{statement}; {named}")
        modules_after(f"{named}; {statement}; assert callable(fs.convert)")


def test_names_that_are_not_there_are_attribute_errors():
    for name in ("adpat", "__wrapped__", "_hidden"):
        assert not hasattr(finespun, name)
    with pytest.raises(AttributeError, match="finespun has no 'adpat'"):
        finespun.adpat  # noqa: B018


def test_names_for_type_checkers_are_those_at_run_time():
    tree = ast.parse(Path(finespun.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {(a.name, node.module) for node in block.body for a in node.names}
    methods = ("*", "finespun.methods.index")
    assert told - {methods} == {(name, finespun._HOMES[name]) for name in finespun.__all__}
    assert methods in told
    assert set(finespun._HOMES) == {*finespun.__all__, *NAMES}
    assert {*finespun.__all__, *NAMES} <= set(dir(finespun))


def test_the_core_loads_few_modules_and_none_of_the_extras():
    assert len(modules_after("import finespun") - modules_after("pass")) <= 20
    added = modules_after("from finespun import *") - modules_after("import torch")
    assert len([name for name in added if not name.startswith("finespun")]) <= 20, sorted(added)
    assert not [name for name in added if name.split(".")[0] in HEAVY]


# --- the tests themselves ------------------------------------------------------------------------
LATE = {
    "accelerate", "bitsandbytes", "datasets", "diffusers", "gguf", "matplotlib", "onnx", "opacus",
    "peft", "ray", "scipy", "sentence_transformers", "sklearn", "tensorboard", "tokenizers",
    "torchao", "transformers", "trl", "wandb",
}  # fmt: skip
TESTS = Path(__file__).parent


def imported_at_once(tree):
    """Names of the modules that are imported when a file is."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported_at_once(node)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("import peft.tuners as t", {"peft.tuners"}),
        ("try:\n from peft import x\nexcept ImportError: pass", {"peft"}),
        ("class A:\n import trl", {"trl"}),
        ("def f():\n import trl", set()),
    ],
)
def test_what_is_imported_at_once_is_seen(text, wanted):
    assert set(imported_at_once(ast.parse(text))) == wanted


def test_no_module_of_tests_imports_what_takes_seconds():
    """Each is imported in the functions that need it, so that tests are collected in seconds."""
    found = {
        f"{path.relative_to(TESTS)}: {name}"
        for path in TESTS.rglob("*.py")
        for name in imported_at_once(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in LATE or name.startswith(("torch.distributed", "torch._dynamo"))
    }
    assert not {name for name in found if not name.startswith("goldens/")}
