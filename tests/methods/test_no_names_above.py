"""No file above methods/ asks which method it has: what it wants to know, the contract answers."""

import ast
from pathlib import Path

import pytest

import finespun

ROOT = Path(finespun.__file__).parent
BELOW = ("methods", "contract", "linalg", "kernels")
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in BELOW)
MADE = {  # who builds a structure of a kind by name, because a format or a default means it
    "LoRA": ("__init__.py", "adapters", "bench", "cli", "files"),
    "LSR": ("__init__.py", "recipes"),
    "DoRA": ("files",),
    "LoHa": ("files",),
    "LoKr": ("files",),
    "lora_of": ("adapters",),
    "STRUCTURES": ("__init__.py",),
}


def imported(tree: ast.Module) -> set[str]:
    """Names that come out of a method's own file or its folder."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "finespun.methods.structures"
        ):
            found |= {alias.name for alias in node.names}
    return found


def asked(tree: ast.Module) -> set[str]:
    """Names that isinstance, issubclass, a match or `type(x) is` compare with."""
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "isinstance",
            "issubclass",
        ):
            found += node.args[1:]
        elif isinstance(node, ast.MatchClass):
            found.append(node.cls)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(s, ast.Call) and getattr(s.func, "id", "") == "type" for s in sides):
                found += sides
    return {n.id for one in found for n in ast.walk(one) if isinstance(n, ast.Name)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_above_methods_asks_for_no_method(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = imported(tree)
    assert not names & asked(tree)
    where = path.relative_to(ROOT).parts[0]
    for name in names:
        assert where in MADE.get(name, ()), f"{path}: {name} comes from a method's own file"


def test_the_rule_sees_what_it_forbids():
    tree = ast.parse(
        "from finespun.methods.structures import LoRA\nisinstance(x, LoRA | int)\ntype(y) is LoRA"
    )
    assert imported(tree) & asked(tree) == {"LoRA"}
