"""Sizes of all Python files and functions: a table for people, and an exit code for CI.

`python tests/sizes.py [FOLDER]` prints the largest of each and fails where one is beyond the limit.
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LONGEST_FILE = {"finespun": 350, "benchmarks": 350, "docs": 350, "tests": 500}
LONGEST_FUNCTION, SHOWN = 60, 10
KNOWN = {"tests/methods/structures/test_lor2c_events.py": 567}  # longer already; it may only shrink


@dataclass(frozen=True)
class Size:
    """A file or a function, its length in lines, and the most that it may have."""

    name: str
    lines: int
    limit: int

    @property
    def beyond(self) -> bool:
        return self.lines > self.limit


def measure(root: Path) -> tuple[list[Size], list[Size]]:
    """Files and functions below `root`, the longest first."""
    files, functions = [], []
    for path in (p for part in LONGEST_FILE for p in sorted((root / part).rglob("*.py"))):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        limit = KNOWN.get(name, LONGEST_FILE[name.partition("/")[0]])
        files.append(Size(name, len(text.splitlines()), limit))
        functions += [
            Size(f"{name}:{node.lineno} {node.name}", lines_of(node), LONGEST_FUNCTION)
            for node in functions_of(ast.parse(text))
        ]
    return (sorted(files, key=rank), sorted(functions, key=rank))


def rank(size: Size) -> tuple[int, str]:
    return -size.lines, size.name


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the last one, decorators left out."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def table(title: str, sizes: Sequence[Size]) -> list[str]:
    """The largest ten, all that are beyond their limit, and what they are measured against."""
    total = sum(size.lines for size in sizes)
    middle = sizes[len(sizes) // 2].lines if sizes else 0
    shown = [s for i, s in enumerate(sizes) if i < SHOWN or s.beyond]
    marks = [f"{s.lines:>6}  {s.name}{f'  > {s.limit}' if s.beyond else ''}" for s in shown]
    return [f"{len(sizes):,} {title}, {total:,} lines, median {middle}; the largest:", *marks, ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables; 1 where anything is beyond its limit, 2 where there is nothing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent.parent)
    files, functions = measure(parser.parse_args(arguments).folder)
    if not files:
        print("no Python files", file=sys.stderr)
        return 2
    print("\n".join([*table("files", files), *table("functions", functions)]))
    wrong = [
        f"{size.name} has {size.lines} lines, at most {size.limit}"
        for size in (*files, *functions)
        if size.beyond
    ]
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
