"""`finespun report`: the page says what the files say, stands alone, and can be read without a
mouse. Pages are parsed; where Chromium is on the path it must open them without a complaint."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import chromium
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import tiny_table, write_recipe

import finespun
from finespun.bench.run import SHEET, TABLE
from finespun.bench.summary import Row, Summary
from finespun.bench.tables import csv_text, markdown
from finespun.cli.app import run
from finespun.errors import FileError
from finespun.files import read_adapter
from finespun.methods.structures import LSR, LoRA
from finespun.report import report
from finespun.report.figure import Axis, Curve, curves, smoothed, thinned
from finespun.report.page import shown, table
from finespun.report.run import layers
from finespun.training.inference import Trained
from finespun.training.output import LOG, RESULT, Result

VOID = {"meta", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers text, ids, attributes and tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        held = dict(attrs)
        self.tags.append((tag, held))
        if held.get("id"):
            self.ids.append(str(held["id"]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def every(self, tag: str) -> list[dict[str, str | None]]:
        return [held for name, held in self.tags if name == tag]

    def cells(self, first: str) -> list[str]:
        """The rest of the first row that begins with `first`."""
        return next(row[1:] for row in self.rows if row and row[0] == first)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished run."""
    folder = tmp_path_factory.mktemp("report")
    assert run(["train", str(write_recipe(folder)), "--quiet"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bench, with names that HTML must not take for its own."""
    folder = tmp_path_factory.mktemp("bench")
    rows = []
    for name, structure, count, scores in (
        ("head only", LoRA(), 0, (0.5, 0.52)),
        ("lora <r=8> & more", LoRA(rank=8), 12288, (0.8, 0.84)),
        ("lsr r=4", LSR(), 3584, (0.81, 0.82)),
        ("lsr r=8", LSR(rank=8), 7000, (0.9, None)),
    ):
        lrs = (1e-3, 1e-2, 1e-1)
        seconds = {"seconds": 1.5, "cpu_seconds": 1.4}
        rows.append(
            Row(name, structure, ("query",), None, count, 34, 5000, 1e-2, lrs, False, scores,
                **seconds)
        )  # fmt: skip
    summary = Summary(tuple(rows), "accuracy", (0, 1), 100, "finespun bench 'a b.yaml'")
    (folder / TABLE).write_text(markdown(summary))
    (folder / SHEET).write_text(csv_text(summary))
    trial = {"member": "lsr r=4", "held": [0.2, 0], "metrics": {"accuracy": 0.7}}
    lines = [{**trial, "recipe": {"training": {"lr": lr, "epochs": 2}}} for lr in (1e-3, 1e-2)]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def opened(folder: Path) -> tuple[str, Page]:
    text = report(folder).read_text(encoding="utf-8")
    return text, Page(text)


# --- a run ---------------------------------------------------------------------------------------
def test_the_page_of_a_run_says_what_its_files_say(done: Path) -> None:
    result = Result.read(done)
    text, page = opened(done)
    before, after = result.before["accuracy"], result.after["accuracy"]
    assert page.cells("accuracy") == [shown(before), shown(after), shown(after - before)]
    assert page.cells("trained parameters in layers") == [shown(result.num_update_parameters)]
    assert page.cells("steps") == ["16"]
    words = "".join(page.words)
    assert (done / "recipe.yaml").read_text() in words
    saved = read_adapter(done)
    assert saved.sha256 in words
    assert page.cells("torch") == [torch.__version__.partition("+")[0]] or torch.__version__ in text
    assert page.cells("finespun") == [finespun.__version__]
    steps = [json.loads(line) for line in (done / LOG).read_text().splitlines()]
    losses = [event["loss"] for event in steps if event["event"] == "step"]
    assert shown(sum(losses[:3]) / 3) in words  # the running mean in the third step
    assert len(page.every("svg")) == 3


def test_layers_are_told_from_the_files_alone(done: Path) -> None:
    adapter = Trained.open(done).adapter
    found = layers(read_adapter(done))
    assert {layer.name: layer.norm for layer in found} == pytest.approx(adapter.norms(), rel=1e-5)
    for layer in found:
        dense = adapter.deltas[layer.name].dense(torch.empty(0)).detach()
        exact = torch.linalg.svdvals(dense)[: len(layer.values)]
        assert layer.values == pytest.approx(exact.tolist(), rel=1e-4, abs=1e-6)
    _, page = opened(done)
    for layer in found:
        assert page.cells(layer.name)[:2] == [layer.shape, shown(layer.norm)]


def test_an_update_that_needs_the_base_is_told_so(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, epochs=1)
    assert run(["train", str(recipe), "structure={kind: hira, rank: 2}", "-q"]) == 0
    text, _ = opened(tmp_path / "out")
    assert "Norms cannot be computed from the files alone" in text
    assert "depends on the base weight" in text


def test_a_run_that_has_not_ended_has_its_page_too(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    lines = (done / LOG).read_text().splitlines(keepends=True)
    (folder / LOG).write_text("".join(lines[:8]) + lines[8][:9])
    text, page = opened(folder)
    assert "A run that has not ended" in text
    assert page.cells("accuracy")[1] == "–"
    assert len(page.every("svg")) == 3


def test_a_loss_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    events = [{"event": "step", "step": i, "loss": None if i == 2 else 0.5} for i in (1, 2, 3)]
    (tmp_path / LOG).write_text("".join(json.dumps(e) + "\n" for e in events))
    text, page = opened(tmp_path)
    assert "nan" not in text.lower()
    assert len(page.every("svg")) == 1


# --- a bench -------------------------------------------------------------------------------------
def test_the_page_of_a_bench_says_what_its_table_says(compared: Path) -> None:
    text, page = opened(compared)
    with (compared / SHEET).open(newline="") as file:
        rows = list(csv.DictReader(file))
    best = max((r for r in rows if r["mean"]), key=lambda r: float(r["mean"]))
    for row in rows:
        name = row["member"]
        cells = page.cells(f"★ {name} (highest mean)" if row is best else name)
        assert cells[0] == f"{int(row['num_update_parameters']):,}"
        assert cells[4] == (shown(float(row["mean"])) if row["mean"] else "–")
    assert "<r=8>" not in text
    assert "finespun bench 'a b.yaml'" in "".join(page.words)
    assert "No ranking: runs diverged (lsr r=8)." in "".join(page.words)
    assert len(page.every("svg")) == 2
    points = page.every("circle") + page.every("polygon")
    assert len(points) == 2  # two means with parameters; the head alone is a line


def test_a_real_bench_has_a_page(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    tiny_table(tmp_path / "table.csv", rows=40)
    file = tmp_path / "bench.yaml"
    file.write_text(
        f"recipe:\n  model: {tmp_path / 'model'}\n  data: {{file: {tmp_path / 'table.csv'}}}\n"
        "  targets: [query]\n  training: {epochs: 1, batch_size: 16, threads: 1}\n"
        "members: [{structure: {kind: lora, rank: 1}}]\n"
        f"lrs: [1e-3, 1e-2, 1e-1]\nseeds: [0]\noutput: {tmp_path / 'out'}\n"
    )
    assert run(["bench", str(file), "-q"]) in (0, 5)
    _, page = opened(tmp_path / "out")
    assert len(page.every("svg")) == 2
    assert "accuracy" in "".join(page.words)


# --- every page ----------------------------------------------------------------------------------
@pytest.mark.parametrize("which", ["done", "compared"])
def test_a_page_stands_alone_and_can_be_read_by_everyone(
    which: str, request: pytest.FixtureRequest
) -> None:
    text, page = opened(request.getfixturevalue(which))
    assert not page.every("script")
    assert not re.findall(r"""(?:src|href|url\()=?["']?(?!#|data:,)[a-z]+:?//""", text)
    assert [held["href"] for held in page.every("a")] == ["#content"]
    assert len(page.ids) == len(set(page.ids))
    assert page.every("html") == [{"lang": "en"}]
    assert len(page.every("h1")) == len(page.every("main")) == 1
    for svg in page.every("svg"):
        assert svg["role"] == "img"
        assert set(str(svg["aria-labelledby"]).split()) <= set(page.ids)
    for held in [*page.every("div"), *page.every("pre")]:
        if held.get("role") == "region":
            assert held["tabindex"] == "0"
            assert held["aria-label"]
    tables = [held for held in page.every("div") if held.get("class") == "scroll"]
    assert len(tables) == len(page.every("table")) == len(page.every("caption"))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "var(--c0)" in text


@pytest.mark.parametrize("which", ["done", "compared"])
def test_chromium_where_it_is_can_read_a_page_in_every_way(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = report(request.getfixturevalue(which))
    drawn = Page(path.read_text(encoding="utf-8"))
    assert len(drawn.every("svg")) > 1
    if chromium.CHROMIUM is None:
        return
    with chromium.opened(path, tmp_path) as tab:
        backs = []
        for width, dark in ((360, False), (1400, False), (1400, True)):
            tab.resize(width, dark)
            assert tab.run("document.documentElement.scrollWidth") <= width
            narrowest = "Math.min(...[...document.querySelectorAll('svg')].map(s=>s.clientWidth))"
            assert tab.run(narrowest) > 250
            backs.append(tab.run("getComputedStyle(document.body).backgroundColor"))
        assert backs[0] == backs[1] != backs[2]
        check_focus(tab)
        spoken = tab.spoken()
        images = [name for role, name in spoken if role == "image"]
        assert len(images) == len(drawn.every("svg"))
        regions = "[...document.querySelectorAll('[role=region]')]"
        seen = tab.run(f"{regions}.filter(e => e.checkVisibility()).length")
        assert [role for role, _ in spoken].count("region") == seen
        for role in ("image", "region", "table", "heading", "link"):
            assert all(name for kind, name in spoken if kind == role), role
        assert {"image", "region", "table", "heading", "link", "main"} <= {r for r, _ in spoken}
        assert tab.complaints == []


def check_focus(tab: chromium.Tab) -> None:
    """Tab reaches the skip link first, then all that opens or scrolls, with a visible mark."""
    wanted = tab.run("document.querySelectorAll('a, summary, [tabindex=\"0\"]').length")
    hidden = tab.run("document.querySelectorAll('details [tabindex=\"0\"]').length")
    reached = [tab.press_tab() for _ in range(wanted - hidden)]
    assert reached[0] == "A.skip"
    assert "BODY." not in reached
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert tab.run("document.activeElement.getBoundingClientRect().top >= 0")


# --- the command ---------------------------------------------------------------------------------
def test_the_command_names_the_page(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(done)]) == 0
    assert capsys.readouterr().out == f"{done / 'report.html'} written\n"


def test_folders_without_a_page(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(tmp_path / "nothing")]) == 3
    assert "is no folder" in capsys.readouterr().err
    assert run(["report", str(tmp_path)]) == 3
    assert "holds no run and no finished bench" in capsys.readouterr().err
    (tmp_path / LOG).write_text('{"event": "start"}\nnot json\n')
    with pytest.raises(FileError, match="line 2 is not JSON"):
        report(tmp_path)
    (tmp_path / LOG).write_text("[3]\n")
    with pytest.raises(FileError, match="line 1: expected an object"):
        report(tmp_path)
    (tmp_path / LOG).write_text("")
    (tmp_path / RESULT).write_text("[]")
    with pytest.raises(FileError, match="expected an object"):
        report(tmp_path)
    other = tmp_path / "bench"
    other.mkdir()
    (other / SHEET).write_text("member,mean\nx,1\n")
    with pytest.raises(FileError, match="no column 'num_update_parameters'"):
        report(other)


# --- figures -------------------------------------------------------------------------------------
numbers = st.floats(-1e6, 1e6).map(lambda v: round(v, 3))


@given(st.lists(numbers, min_size=1, max_size=20), st.booleans())
def test_an_axis_keeps_order_and_holds_every_value(values: list[float], log: bool) -> None:
    if log:
        values = [abs(v) + 1e-3 for v in values]
    axis = Axis.over(values, 0.0, 100.0, log)
    places = [axis.at(v) for v in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)
    ticks = axis.ticks()
    assert ticks == sorted(set(ticks))
    assert all(-1e-6 <= axis.at(tick) <= 100 + 1e-6 for tick in ticks)


@given(st.lists(numbers, min_size=1, max_size=2000), st.integers(1, 50))
def test_thinning_keeps_the_mean_of_equal_stretches(values: list[float], most: int) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    found = thinned(points, most)
    assert len(found) <= most
    if len(values) % len(found) == 0:
        mean = sum(b for _, b in found) / len(found)
        assert mean == pytest.approx(
            sum(values) / len(values), abs=1e-6 * max(map(abs, values), default=1) + 1e-9
        )


def test_a_running_mean_of_a_line_lags_behind_it() -> None:
    points = [(float(i), float(i)) for i in range(10)]
    assert [b for _, b in smoothed(points)] == [0, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 7]


def test_nothing_to_draw_is_no_figure() -> None:
    assert curves("empty", [Curve("a", [])], "x", "y") == ""
    assert table(("a",), [], "empty") == ""


def test_what_is_told_is_escaped() -> None:
    text = curves("a <b> & c", [Curve("<x>", [(1.0, 1.0), (2.0, 2.0)])], "<s>", "y") + table(
        ("<h>",), [("<v>",)], "<c>"
    )
    assert not re.search(r"<[bxshvc]>", text)
