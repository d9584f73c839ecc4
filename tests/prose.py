"""Words that errors, help, docstrings and documentation do not use, and the text to look at.

`python tests/prose.py` prints every place with one of them; tests/test_prose.py fails there.
Text is what a reader sees: strings of the code by the syntax tree (docstrings, messages, help), and
pages without code. Names in backticks are code.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "mkdocs.yml", "pyproject.toml", "Makefile")

# Pattern -> what to write instead.
WORDS = {
    r"tells?|told|telling": "show, give, report, distinguish",
    r"hears?|heard|hearing": "receive, know",
    r"foretells?|foretold|foretelling": "predict, estimate",
    r"stays? so": "remains untrained, is kept",
    r"(?:is|are|was|were|be|been|has|have) said": "is given, is reported, is passed",
    r"said": "given, passed, stated",
    r"lawful": "allowed, valid",
    r"mend(?:s|ed|ing)?": "fix, repair",
    r"knows? no": "is independent of",
    r"speaks? (?:of|for)": "name, hold, represent",
    r"without a word": "silently",
    r"owes?": "must provide",
    r"wants": "needs",
    r"spelt": "written, spelled",
    r"a (?:embedding|update|adapter|allocation|initializer|objective|error|option|epoch)": "an",
    r"(?:trained|stored|saved|fewest|its|their|M|million) numbers": "parameters, values",
    r"numbers (?:a term|a layer|a module|a site)": "parameters, values",
    r"(?<![Ll]earning\s)(?<!dropout )(?<!decay )rates?": "learning rate, lr",
}
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{word})\b)" for i, word in enumerate(WORDS)))

# (path, regular expression of the text around it) -> why it may stand.
ALLOWED = {
    ("finespun/deprecated.py", r"^rates?$"): "a key of 0.1's recipes and bench files",
    ("finespun/bench/trials.py", r"^rate$"): "a key of trials that 0.1 wrote",
    ("finespun/kernels/lowrank.py", r"its rate\s|rounded rate"): "the rate of dropout",
    ("finespun/methods/structures/s2_lora.py", r"by rate·λ"): "the step of a proximal map",
}
EXEMPT = {
    "CHANGELOG.md": "what was released is not rewritten",
    "docs/results": "measured; tables are written by the bench",
    "docs/migration.md": "speaks of the names of 0.1",
}
CODE = re.compile(r"`[^`]*`")
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


class Found(NamedTuple):
    """A word that is not used here: where, in what text, and what to write instead."""

    place: str
    word: str
    text: str
    instead: str


def files() -> list[Path]:
    """Every file with prose for users and developers."""
    code = [p for part in ("finespun", "benchmarks", "docs") for p in (ROOT / part).rglob("*.py")]
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
    pages += [ROOT / name for name in PAGES if (ROOT / name).is_file()]
    return sorted(p for p in code + pages if p.relative_to(ROOT).as_posix() not in EXEMPT)


def texts(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of all that a reader sees; code is left out."""
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.lineno, CODE.sub("``", node.value)
        return
    blank = FENCE.sub(lambda m: "\n" * m.group().count("\n"), source)
    yield 1, CODE.sub(lambda m: "``" + "\n" * m.group().count("\n"), blank)


def found(path: Path, source: str) -> Iterator[Found]:
    """Every word of the list in a file, those with a reason left out."""
    name = path.relative_to(ROOT).as_posix()
    for line, text in texts(path, source):
        for hit in PATTERN.finditer(text):
            around = text[max(0, hit.start() - 40) : hit.end() + 40]
            if any(name == where and re.search(rx, around) for where, rx in ALLOWED):
                continue
            place = f"{name}:{line + text[: hit.start()].count(chr(10))}"
            index = int(str(hit.lastgroup)[1:])
            yield Found(place, hit.group(), " ".join(around.split()), list(WORDS.values())[index])


def main() -> int:
    """Print every place; 1 where there is one."""
    every = [one for path in files() for one in found(path, path.read_text(encoding="utf-8"))]
    for one in every:
        print(f"{one.place}: {one.word!r} in '{one.text}'; write: {one.instead}")
    return int(bool(every))


if __name__ == "__main__":
    sys.exit(main())
