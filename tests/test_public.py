"""What the package promises of its own shape: names, docstrings, sizes, options."""

import ast
import dataclasses
import importlib
import pkgutil
from pathlib import Path

import pytest
from methods import IA3, Bypass, DoRA, HiRA, UniLoRA
from torch import nn

import finespun
from finespun import contract
from finespun.contract import Delta
from finespun.methods.structures import STRUCTURES

ROOT = Path(finespun.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_OPTIONS = 8


def trees():
    for path in FILES:
        text = path.read_text()
        yield path.relative_to(ROOT.parent), text, ast.parse(text)


def test_the_public_names_are_listed_once_and_are_there():
    assert len(set(finespun.__all__)) == len(finespun.__all__)
    assert all(getattr(finespun, name) is not None for name in finespun.__all__)


def test_every_public_name_has_an_entry_in_the_reference():
    page = (ROOT.parent / "docs" / "api.md").read_text(encoding="utf-8")
    for name in finespun.__all__:
        assert (
            f"::: finespun.{name}\n" in page
            or f"`finespun.{name}`" in page
            or f"`fs.{name}`" in page
        ), name


def test_every_package_lists_what_it_offers():
    for info in pkgutil.walk_packages([str(ROOT)], "finespun."):
        if not info.ispkg:
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{info.name}.{name}"


def subclasses(cls):
    return [cls, *(s for child in cls.__subclasses__() for s in subclasses(child))]


def test_no_method_of_a_delta_hides_one_of_nn_module():
    """nn.Module's own names mean something to optimisers, hooks and users."""
    allowed = {"__init__", "forward", "_apply", "_load_from_state_dict", "train"}
    theirs = {n for n in dir(nn.Module()) if not n.startswith("__")} - allowed
    theirs |= {"weight", "bias"}
    for cls in subclasses(Delta):
        for level in cls.__mro__[: cls.__mro__.index(nn.Module)]:
            assert not theirs & set(vars(level)), (cls, theirs & set(vars(level)))


def test_everything_public_says_what_it_is():
    silent = []
    for path, _, tree in trees():
        if not ast.get_docstring(tree):
            silent.append(str(path))
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                silent.append(f"{path}:{node.lineno} {node.name}")
    assert not silent, "\n".join(silent)


def test_no_assert_checks_input_and_nothing_swallows_errors():
    bad = []
    for path, _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                bad.append(f"{path}:{node.lineno} assert")
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or all(isinstance(s, ast.Pass) for s in node.body)
            ):
                bad.append(f"{path}:{node.lineno} swallows an error")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "form", [*STRUCTURES.values(), DoRA, HiRA, IA3, UniLoRA, Bypass], ids=lambda form: form.kind
)
def test_a_structure_is_frozen_and_has_few_options(form):
    fields = dataclasses.fields(form)
    assert len(fields) <= MOST_OPTIONS
    assert all(f.default is not dataclasses.MISSING for f in fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        form().seed = 3
    assert set(form.aliases.values()) <= {f.name for f in fields}
    assert form.kind
    assert issubclass(form, contract.Structure)
