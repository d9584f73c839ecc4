"""A constant has one home: what other modules import has a name that no other module gives."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent / "finespun"


def named(tree: ast.Module) -> set[str]:
    """The constants that a module defines."""
    found = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper()}
    return {name for name in found if len(name) > 1}


def imported(tree: ast.Module) -> set[tuple[str, str]]:
    """(module, constant) of all that a module imports from others of the package."""
    return {
        (node.module or "", alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.isupper()
    }


def test_an_imported_constant_has_a_name_of_its_own():
    homes: defaultdict[str, set[str]] = defaultdict(set)
    used: set[tuple[str, str]] = set()
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = ".".join(("finespun", *path.relative_to(ROOT).with_suffix("").parts))
        for name in named(tree):
            homes[name].add(module)
        used |= imported(tree)
    assert len(used) > 20
    shared = {name for module, name in used if module in homes[name] and len(homes[name]) > 1}
    assert not {name: sorted(homes[name]) for name in shared}


def test_the_constants_of_a_module_are_found():
    tree = ast.parse("A_B = 1\nCD: int = 2\nlower = 3\nfrom finespun.x import EF, g\n")
    assert named(tree) == {"A_B", "CD"}
    assert imported(tree) == {("finespun.x", "EF")}
