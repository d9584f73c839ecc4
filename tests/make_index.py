"""Write finespun/methods/index.py: where every method of the package lives."""

import ast
from pathlib import Path

METHODS = Path(__file__).parent.parent / "finespun" / "methods"
INDEX = METHODS / "index.py"


def homes() -> dict[str, str]:
    """Class name -> module of every class that is registered in a folder of methods, read and not
    imported: methods import each other by the very names that are written here."""
    found: dict[str, str] = {}
    for file in sorted(METHODS.glob("*/*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            marks = getattr(node, "decorator_list", ())
            if any(isinstance(mark, ast.Name) and mark.id == "register" for mark in marks):
                assert node.name not in found, f"{node.name} is there twice"
                found[node.name] = f"finespun.methods.{file.parent.name}.{file.stem}"
    return dict(sorted(found.items()))


def text() -> str:
    """The file as it must be."""
    names = homes()
    imports = sorted((home, name) for name, home in names.items())
    return "\n".join(
        [
            '"""Where every method lives; written by tests/make_index.py, not by hand."""',
            "",
            "from typing import TYPE_CHECKING",
            "",
            "if TYPE_CHECKING:",
            *(f"    from {home} import {name} as {name}" for home, name in imports),
            "",
            "NAMES = {",
            *(f'    "{name}": "{home}",' for name, home in names.items()),
            "}",
            "",
        ]
    )


if __name__ == "__main__":
    INDEX.write_text(text(), encoding="utf-8")
