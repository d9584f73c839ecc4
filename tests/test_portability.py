"""What would break on another system is refused here: modules of POSIX, text in the encoding of the
machine, names of files that Windows or macOS cannot hold. Nothing here runs on those systems."""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "finespun").rglob("*.py"))
POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"}
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def unguarded(tree: ast.Module) -> list[str]:
    """Modules of POSIX that are imported where no `if` and no `try` stands above."""
    found = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If | ast.Try):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in POSIX]
        if isinstance(node, ast.ImportFrom) and node.module in POSIX:
            found.append(node.module)
        waiting += ast.iter_child_nodes(node)
    return found


def unencoded(tree: ast.Module) -> Iterator[int]:
    """Lines that open, read or write a text file without `encoding=`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        named = {word.arg for word in node.keywords}
        if isinstance(node.func, ast.Attribute):
            name = node.func.attr
            own = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if own in ("os", "Trained") or own[:1].isupper():
                continue
        else:
            name = "open" if getattr(node.func, "id", "") == "open" else ""
        if name == "open":
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            modes += [w.value.value for w in node.keywords if w.arg == "mode"]
            if any(isinstance(mode, str) and "b" in mode for mode in modes):
                continue
        if name in ("open", "read_text", "write_text") and "encoding" not in named:
            yield node.lineno


def clashes(names: list[str]) -> list[str]:
    """Paths that differ by case alone, or that Windows reserves or cannot hold."""
    parents = {str(p) for n in names for p in PurePosixPath(n).parents} | set(names)
    folded = Counter(name.casefold() for name in parents)
    bad = {name for name in parents if folded[name.casefold()] > 1}
    for name in names:
        for part in PurePosixPath(name).parts:
            if RESERVED.fullmatch(part) or re.search(r'[<>:"|?*\\]', part) or part[-1] in ". ":
                bad.add(name)
    return sorted(bad)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_runs_on_every_system(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert unguarded(tree) == []
    assert list(unencoded(tree)) == []


def test_every_file_can_be_held_by_every_system():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True
    )
    names = [name for name in listed.stdout.split("\0") if name]
    if not names:
        names = [p.relative_to(ROOT).as_posix() for p in MODULES]
    assert clashes(names) == []


def test_what_would_break_is_found():
    assert unguarded(ast.parse("import fcntl")) == ["fcntl"]
    assert unguarded(ast.parse("def f():\n    from pwd import getpwall")) == ["pwd"]
    assert unguarded(ast.parse("if x:\n    pass\nelse:\n    import resource")) == []
    assert list(unencoded(ast.parse("open('a')\np.open('r')\nopen('a', 'rb')"))) == [1, 2]
    assert list(unencoded(ast.parse("p.read_text()\np.write_text(t, encoding='utf-8')"))) == [1]
    assert clashes(["a/B.py", "a/b.py"]) == ["a/B.py", "a/b.py"]
    assert clashes(["x/Nul.txt", "a/con/b", "what?", "dot."]) == [
        "a/con/b", "dot.", "what?", "x/Nul.txt",
    ]  # fmt: skip
    assert clashes(["a/b.py", "a/c.py"]) == []
