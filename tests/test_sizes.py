"""The table of sizes: it counts, it passes what is short, and it fails what is long."""

from pathlib import Path

import pytest
import sizes

FILE = sizes.LONGEST_FILE["finespun"]
SHORT = "def f():\n    return 1\n"
LONG = "def g():\n" + "    x = 1\n" * sizes.LONGEST_FUNCTION


def tree(root: Path, **files: str) -> Path:
    for part in sizes.LONGEST_FILE:
        (root / part).mkdir()
    for name, text in files.items():
        (root / "finespun" / f"{name}.py").write_text(text)
    return root


def test_this_repository_keeps_its_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes.main([]) == 0, capsys.readouterr().err
    assert "files, " in capsys.readouterr().out


def test_files_and_functions_are_counted(tmp_path: Path) -> None:
    files, functions = sizes.measure(tree(tmp_path, a=SHORT, b=SHORT * 3))
    assert [(f.name, f.lines) for f in files] == [("finespun/b.py", 6), ("finespun/a.py", 2)]
    assert [f.lines for f in functions] == [2] * 4
    assert functions[0].name == "finespun/a.py:1 f"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LONG, "finespun/new.py:1 g has 61 lines, at most 60"),
        ("class A:\n    async " + LONG.replace("\n", "\n    "), "finespun/new.py:2 g has 61 lines"),
        ("x = 1\n" * (FILE + 1), "finespun/new.py has 351 lines, at most 350"),
    ],
)
def test_an_outlier_fails(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path, old=SHORT)
    assert sizes.main([str(root)]) == 0
    assert capsys.readouterr().err == ""
    (root / "finespun" / "new.py").write_text(text)
    assert sizes.main([str(root)]) == 1
    shown = capsys.readouterr()
    assert told in shown.err
    assert "finespun/new.py" in shown.out


def test_the_limits_themselves_are_allowed(tmp_path: Path) -> None:
    whole = "x = 1\n" * FILE
    function = "def g():\n" + "    x = 1\n" * (sizes.LONGEST_FUNCTION - 1)
    assert sizes.main([str(tree(tmp_path, file=whole, function=function))]) == 0


def test_tests_may_be_longer(tmp_path: Path) -> None:
    root = tree(tmp_path, old=SHORT)
    (root / "tests" / "test_a.py").write_text("x = 1\n" * 500)
    assert sizes.main([str(root)]) == 0
    (root / "tests" / "test_a.py").write_text("x = 1\n" * 501)
    assert sizes.main([str(root)]) == 1


def test_an_empty_folder_is_no_success(tmp_path: Path) -> None:
    assert sizes.main([str(tmp_path)]) == 2
