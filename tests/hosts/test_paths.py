"""The table of paths by itself, and the classes that it stands for."""

import ast
import itertools
from pathlib import Path

import pytest

from finespun import hosts
from finespun.hosts import paths

HOSTS = Path(hosts.__file__).parent


def first_row(columns):
    """The path, as the table reads: row by row, all of `where`, none of `unless`."""
    return next(
        row.path
        for row in paths.TABLE
        if columns & row.where == row.where and not columns & row.unless
    )


def all_columns():
    """Every value of the fixed columns with every value of the others."""
    fixed = range(paths.FIXED + 1)
    return itertools.product(fixed, range(0, max(paths.COLUMNS) << 1, paths.FIXED + 1))


def test_what_is_resolved_beforehand_is_the_table():
    assert all(paths.choose(fixed, now) == first_row(fixed | now) for fixed, now in all_columns())


def test_every_row_of_the_table_can_be_taken():
    taken = {
        next(
            i
            for i, row in enumerate(paths.TABLE)
            if (fixed | now) & row.where == row.where and not (fixed | now) & row.unless
        )
        for fixed, now in all_columns()
    }
    assert taken == set(range(len(paths.TABLE)))


def test_columns_that_a_layer_does_not_read_change_no_path():
    """Under hooks nothing but hooks, gain and features is looked at; without others alone, no
    question of the plain layer is asked."""
    seen = paths.WATCHED | paths.GAIN
    for fixed, now in all_columns():
        if now & paths.WATCHED:
            assert paths.choose(fixed, now) == paths.choose(fixed, now & seen)
        if not now & paths.ALONE:
            rest = now & ~(paths.PLAIN | paths.ORDINARY | paths.UNIT | paths.DROPS)
            assert paths.choose(fixed, now) == paths.choose(fixed, rest)
        if not fixed & paths.THROUGH:
            rest = now & ~(paths.UNIT | paths.DROPS | paths.START | paths.MERGED)
            assert paths.choose(fixed, now) == paths.choose(fixed, rest)


def test_the_columns_are_told_apart():
    assert len({name for name, _ in paths.COLUMNS.values()}) == len(paths.COLUMNS)
    assert sum(paths.COLUMNS) == (max(paths.COLUMNS) << 1) - 1
    used = [row.where | row.unless for row in paths.TABLE]
    assert all(any(column & row for row in used) for column in paths.COLUMNS)


@pytest.mark.parametrize("page", ["architecture.md", "hosts.md"])
def test_the_pages_show_the_table(page):
    text = (HOSTS.parent.parent / "docs" / page).read_text(encoding="utf-8")
    shown = paths.table() if page == "architecture.md" else paths.columns()
    assert shown in text


# --- classes --------------------------------------------------------------------------------------


def methods_of_classes():
    for file in sorted(HOSTS.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        yield f"{file.stem}.{node.name}.{method.name}", method


def only_hands_on(method):
    """Whether a method's whole body is a call of its own name on another class or on super()."""
    body = [
        n
        for n in method.body
        if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
    ]
    if len(body) != 1 or not isinstance(body[0], ast.Return | ast.Expr):
        return False
    call = body[0].value
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
        return False
    if call.func.attr != method.name:
        return False
    owner = call.func.value
    by_class = isinstance(owner, ast.Name) and owner.id[:1].isupper()
    by_super = (
        isinstance(owner, ast.Call)
        and isinstance(owner.func, ast.Name)
        and owner.func.id == "super"
    )
    given = [a.arg for a in method.args.args][0 if by_class else 1 :]
    same = [a.id for a in call.args if isinstance(a, ast.Name)] == given
    return (by_class or by_super) and same


def test_no_subclass_only_calls_its_grandparent():
    found = dict(methods_of_classes())
    assert len(found) > 100
    assert [name for name, method in found.items() if only_hands_on(method)] == []


def test_the_search_finds_what_only_hands_on():
    source = "def f(self, x):\n    '''Told.'''\n    return Host.f(self, x)"
    other = "def f(self, x):\n    return super().f(x)"
    mine = "def f(self, x):\n    return super().f(x + 1)"
    found = [only_hands_on(ast.parse(s).body[0]) for s in (source, other, mine)]
    assert found == [True, True, False]
