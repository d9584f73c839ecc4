"""Write docs/agreement.md from tests/agreement/*.toml: what methods are known to do, the test that
holds each to it, and the figure that was measured.

A file is one part of the page: `title`, `intro`, and rows of `claim` (what the paper, or the
mathematics, says), `source`, `test` (FILE::FUNCTION) and `figure` (what was seen, and what the test
allows).
"""

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PARTS, PAGE = ROOT / "tests" / "agreement", ROOT / "docs" / "agreement.md"
KEYS = ("claim", "source", "test", "figure")
HEAD = """# Agreement with the papers

What every method is known to do, from its paper or by its mathematics, with the test that holds it
to that and the figure that was measured. `make test` runs them all; the page is written by
`tests/make_agreement.py`.
"""


def parts() -> dict[str, dict[str, Any]]:
    """File name -> its content."""
    files = sorted(PARTS.glob("*.toml"))
    return {file.name: tomllib.loads(file.read_text(encoding="utf-8")) for file in files}


@cache
def functions(file: Path) -> frozenset[str]:
    """The functions that a test file defines."""
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    return frozenset(n.name for n in nodes if isinstance(n, ast.FunctionDef))


def faults() -> list[str]:
    """What is wrong with the rows: a key that is missing or empty, a test that is not there."""
    found = []
    for name, part in parts().items():
        for row in part.get("row", []):
            missing = [key for key in KEYS if not str(row.get(key, "")).strip()]
            if missing or set(row) - set(KEYS):
                found.append(f"{name}: {row} needs exactly {', '.join(KEYS)}")
                continue
            file, _, function = row["test"].partition("::")
            path = ROOT / file
            if not path.is_file() or function not in functions(path):
                found.append(f"{name}: {row['claim']!r} has no test {row['test']}")
    return found


def text() -> str:
    """The page as it must be."""
    lines = [HEAD]
    for part in parts().values():
        lines += [f"## {part['title']}", "", part["intro"].strip(), ""]
        lines += ["| what holds | from | seen | test |", "| --- | --- | --- | --- |"]
        for row in part["row"]:
            file, _, function = row["test"].partition("::")
            shown = f"`{Path(file).name}`: `{function}`"
            cells = (row["claim"], row["source"], row["figure"], shown)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
