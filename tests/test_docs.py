"""README and docs: every block runs and prints what is shown, links lead somewhere, the site is
whole and needs nothing from elsewhere.

The blocks of a page run in order in one folder that holds a copy of `examples`, as a reader would
run them. `sh` and `python` blocks run; a `text` block right below is what they print (`...` stands
for anything); a block with a title is a file; `yaml` must be a recipe. Comments right above a block
change that, each readable in the source:

    <!-- slow -->              the page runs with the slow tests
    <!-- in tests: A => B -->  A, which must occur, is replaced by B before it runs
    <!-- exit 2 -->            its last line ends with this code
    <!-- figures vary -->      parameters in the output differ from machine to machine
    <!-- not run: reason -->   it is not run; such blocks are counted below
"""

import contextlib
import doctest
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from finespun.cli.app import run
from finespun.contract.method import REGISTRY
from finespun.recipes.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "axes").glob("*.md"))
NOT_RUN = {
    "it would run the tests that run it": 1,
    "it takes minutes, and the tests of the command line train and compare too": 4,
    "a line of tests/suite.py, which runs it": 1,
    "a study of several minutes": 1,
    "needs a model": 2,
    "it takes hours; a test checks that the tables follow from the published trials": 1,
}

FENCE = re.compile(r"^( *)```(\S*)(.*)$")
COMMENT = re.compile(r"<!-- (slow|figures vary|in tests: .+? => .*?|exit \d+|not run: .+?) -->")
GENERATED = re.compile(
    r"<!-- (table of (?:methods|axes)|what goes together|reference of methods|keys of a recipe|"
    r"commands|gallery|end) -->"
)
TITLE = re.compile(r'title="([^"]+)"')
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the comments above it and the output below it."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str
    comments: tuple[str, ...]
    output: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def reason(self) -> str | None:
        """Why it is not run, if it is not."""
        return next((c[9:] for c in self.comments if c.startswith("not run: ")), None)

    @property
    def exit_code(self) -> int:
        return next((int(c[5:]) for c in self.comments if c.startswith("exit ")), 0)

    def for_tests(self) -> str:
        """The text at the size of a test."""
        text = self.text
        for comment in self.comments:
            if comment.startswith("in tests: "):
                old, new = comment.removeprefix("in tests: ").split(" => ")
                assert old in text, f"{self.place} does not hold {old!r}"
                text = text.replace(old, new)
        return text


def parse(page: Path) -> list[Block]:
    """The blocks of a page; a `text` block right below a block that runs becomes its output."""
    blocks: list[Block] = []
    comments: list[str] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    adjacent = False
    for number, line in lines:
        if fence := FENCE.match(line):
            text = "\n".join(_until_closed(lines, fence[1])) + "\n"
            title = TITLE.search(fence[3])
            block = Block(page, number, fence[2], title and title[1], text, tuple(comments))
            if block.language == "text" and adjacent and not comments:
                before = blocks.pop()
                block = Block(**{**before.__dict__, "output": text})
            blocks.append(block)
            adjacent = block.language in ("sh", "python") and block.output is None
            comments = []
        elif GENERATED.fullmatch(line.strip()):
            adjacent = False
        elif line.strip().startswith("<!--"):
            found = COMMENT.fullmatch(line.strip())
            assert found, f"{page.name}:{number}: {line} is no comment that the tests know"
            comments.append(found[1])
            adjacent = False
        elif line.strip():
            assert not comments, f"{page.name}:{number}: the comment above stands over no block"
            adjacent = False
    return blocks


def _until_closed(lines: Iterator[tuple[int, str]], indent: str) -> Iterator[str]:
    for _, line in lines:
        if line.strip() == "```":
            return
        yield line.removeprefix(indent)
    raise AssertionError("a block is never closed")


BLOCKS = {page: parse(page) for page in PAGES}


def runs(page: Path) -> bool:
    return any(b.reason is None and b.language in ("sh", "python") for b in BLOCKS[page])


def cases() -> list[object]:
    """A test for every page with something to run; slow where a block says so."""
    return [
        pytest.param(
            page,
            id=page.stem,
            marks=[pytest.mark.slow] if any("slow" in b.comments for b in BLOCKS[page]) else [],
        )
        for page in PAGES
        if runs(page)
    ]


@pytest.fixture
def registered():
    """Methods that a page registers are gone after it."""
    yield
    for known in REGISTRY.values():
        for kind in [k for k, made in known.items() if made.__module__ == "page"]:
            del known[kind]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("page", cases())
def test_every_block_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in BLOCKS[page]:
        if block.reason is not None:
            continue
        text = block.for_tests()
        if block.title is not None:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(text, encoding="utf-8")
        elif block.language == "sh":
            same(block, run_shell(block, text))
        elif block.language == "python":
            same(block, run_python(block, text, module))


def run_shell(block: Block, text: str) -> str:
    """What it prints: results of a command that ends well, the error of one that does not. Lines of
    `finespun` run in this process, which has torch loaded already; anything else in bash."""
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    if all(line[0] == "finespun" for line in lines):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            codes = [run(line[1:]) for line in lines]
        code, printed, told = codes[-1], out.getvalue(), err.getvalue()
        assert not any(codes[:-1]), f"{block.place}\n{told}"
    else:
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", text],
            capture_output=True,
            text=True,
            check=False,
        )
        code, printed, told = done.returncode, done.stdout, done.stderr
    assert code == block.exit_code, f"{block.place}\n{printed}\n{told}"
    return told if block.exit_code else printed


def run_python(block: Block, text: str, module: types.ModuleType) -> str:
    """What the block prints; later blocks of the page see its names."""
    printed = io.StringIO()
    code = compile("\n" * block.line + text, str(block.page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, module.__dict__)
    return printed.getvalue()


def same(block: Block, printed: str) -> None:
    if block.output is not None and block.output.strip() != "...":
        both = [block.output, printed]
        if "figures vary" in block.comments:
            both = [re.sub(r"\d+([.,]\d+)*(e-?\d+)?", "0", text) for text in both]
        shown = f"{block.place}\nshown:\n{block.output}\nprinted:\n{printed}"
        assert doctest.OutputChecker().check_output(*both, SAME), shown


def every_block() -> list[Block]:
    return [block for page in PAGES for block in BLOCKS[page]]


def test_every_block_has_a_part_in_the_tests():
    known = ("sh", "python", "yaml", "csv")
    astray = [
        b.place
        for b in every_block()
        if b.reason is None and b.language not in known and b.title is None
    ]
    assert not astray, f"neither run, nor an output, nor marked: {astray}"
    marked: dict[str, int] = {}
    for block in every_block():
        if block.reason is not None:
            marked[block.reason] = marked.get(block.reason, 0) + 1
    assert marked == NOT_RUN


def test_recipes_in_the_docs_are_recipes():
    for block in every_block():
        if block.language == "yaml" and block.reason is None:
            Recipe.parse(block.for_tests(), source=block.place)


def test_links_lead_somewhere():
    pages = [*PAGES, ROOT / "CHANGELOG.md"]
    broken = []
    for page in pages:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            file, _, anchor = target.partition("#")
            if re.match(r"https?:", target):
                continue
            place = (page.parent / file).resolve() if file else page
            if not place.exists() or (anchor and anchor not in anchors(place)):
                broken.append(f"{page.name}: {target}")
    assert not broken


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[`*]", "", heading).lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h)).strip("-") for h in plain}


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    fetched = re.compile(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)')
    texts = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert {page.name: found for page, t in texts.items() if (found := fetched.findall(t))} == {}
    for folder in (ROOT / "docs" / "results").iterdir():
        reported = texts[tmp_path / "gallery" / f"{folder.name}.html"]
        assert f'<a href="gallery/{folder.name}.html">' in texts[tmp_path / "gallery.html"]
        given = (folder / "table.csv").is_file() and '"held": [' not in (
            folder / "results.jsonl"
        ).read_text(encoding="utf-8")
        assert reported.count("<svg ") > (0 if given else 1)
        assert "<script" not in reported
    assert "<math" in texts[tmp_path / "lsr.html"]
    assert not [page.name for page, text in texts.items() if 'class="arithmatex"' in text]


def test_the_picture_is_what_its_script_draws(tmp_path):
    script = ROOT / "docs" / "assets" / "lsr.py"
    drawn = tmp_path / "lsr.svg"
    runpy.run_path(str(script))["draw"](drawn)
    words = [
        re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text(encoding="utf-8"))
        for file in (drawn, script.with_suffix(".svg"))
    ]
    assert words[0] == words[1]
    assert "3,584" in words[0]


@pytest.mark.parametrize("page", PAGES[2:], ids=lambda page: page.name)
def test_generated_tables_are_fresh(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "hooks")
    generated = importlib.import_module("generated")
    text = page.read_text(encoding="utf-8")
    assert generated.filled(text) == text, "run: python docs/hooks/generated.py"


def test_a_stale_table_is_written_anew(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "hooks")
    generated = importlib.import_module("generated")
    mark = "<!-- table of axes -->"
    fresh = generated.filled(f"before\n\n{mark}\n\nafter\n")
    assert fresh.startswith(f"before\n\n{mark}\n\n| axis |")
    assert fresh.endswith("<!-- end -->\n\nafter\n")
    assert generated.filled(fresh.replace("structure", "stale")) == fresh == generated.filled(fresh)
