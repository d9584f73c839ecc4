"""The command line on what nobody should give it: one line, an exit code, no traceback."""

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finespun.cli import app
from finespun.recipes.recipe import Recipe

RECIPE = (
    "model: {model}\ndata: {{file: {table}}}\nstructure: {{kind: lora, rank: 2}}\noutput: out\n"
)
BAD_VALUES = (
    "2001-13-45", "0b", "0x", "1:99999999999999999999:1", "!!int x", "!!float y", "!!timestamp z",
    "!!binary '###'", "!!python/object:os.system {}", "&a [*a]", "{[1]: 2}", "? [1, 2]",
    "!!set {a}", "9" * 5000, "9" * 30, "-" + "9" * 25, "[" * 5000, "{a: " * 5000,
    "- " * 3000, "\"\\ud800\"",
    "\x1b[31m", "[1, 2", "@", "%TAG", "<<: 3", "!!merge x", "1e999", ".nan", "0o8", "2024-01-01",
)  # fmt: skip
KEYS = (
    "structure.rank",
    "training.threads",
    "training.epochs",
    "targets",
    "output",
    "model",
    "a.b",
)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text("text,label\na,x\nb,y\nc,x\nd,y\n")
    return path


@pytest.fixture
def recipe(tmp_path: Path, table: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RECIPE.format(model=tmp_path / "none", table=table))
    return path


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Ends what hangs."""
    assert threading.current_thread() is threading.main_thread()

    def late(*_: object) -> None:
        raise TimeoutError(f"over {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line says; it must be an error foreseen, and nothing a terminal obeys."""
    with within(20):
        code = app.run(arguments)
    told = capfd.readouterr()
    assert code in (2, 3, 4), told.err
    assert "Traceback" not in told.err
    assert "unforeseen" not in told.err
    assert told.err.replace("\n", "").replace("\t", "").isprintable()
    return told.err


@pytest.mark.parametrize("key", KEYS)
def test_overrides_of_every_bad_kind(
    key: str, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for value in BAD_VALUES:
        refused(capfd, "train", str(recipe), f"{key}={value}", "--dry-run")


@pytest.mark.parametrize("value", BAD_VALUES, ids=range(len(BAD_VALUES)))
def test_recipes_of_every_bad_kind(
    value: str, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = recipe.read_text()
    for written in (f"{text}targets: {value}\n", value, f"{text}{value}: 3\n"):
        recipe.write_text(written, encoding="utf-8", errors="surrogatepass")
        refused(capfd, "train", str(recipe), "--dry-run")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def long(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": pipe,
    "a terabyte": long,
    "a folder": Path.mkdir,
    "a circle": lambda path: path.symlink_to(path.name),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 9) and None,
    "nothing": lambda path: None,
    "empty": Path.touch,
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_every_bad_kind(
    kind: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for ending in (".yaml", ".csv", ".jsonl", ".parquet", ".txt"):
        path = tmp_path / f"bad{ending}"
        FILES[kind](path)
        refused(capfd, "train", str(path), "--dry-run")
        if ending != ".yaml":
            refused(capfd, "train", str(recipe), f"data.file={path}", "--dry-run")
            refused(capfd, "init", str(path), "none")


NAMES = ("\x1b[31m", "a\x07", "..", "\u202e", "--", "a" * 5000, "", " ", "\n", "-x", "%s", "{}")


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.parametrize("command", [name.name for name in app.app.registered_commands])
def test_arguments_of_every_bad_kind(
    command: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command is not None
    with within(20):
        app.run([command, name, name, name])
    told = capfd.readouterr()
    assert "Traceback" not in told.err + told.out
    assert "unforeseen" not in told.err
    shown = (told.err + told.out).replace("\n", "").replace("\t", "")
    assert not set(shown) & set("\x1b\x07\u202e")


LINES = (
    '{"event": []}', '{"event": "step"}', '{"event": "step", "step": "x"}', "[]", "3", "{",
    '{"event": "step", "step": 1, "loss": "a"}', '{"event": "step", "step": 1, "loss": [1]}',
    '{"event": "evaluation"}', '{"event": "evaluation", "when": [], "metrics": {}}',
    '{"event": "evaluation", "when": "before", "metrics": [1]}', '{"event": "note"}',
    '{"event": "evaluation", "when": "before", "metrics": {"a": {}}}', '{"event": NaN}',
    '{"event": "note", "text": 3}', '{"event": "step", "step": 1e999}', "[" * 100_000,
    '{"event": "step", "step": ' + "9" * 400 + "}", '{"event": "step", "step": true}', "\x00",
)  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_logs_of_every_bad_kind(
    line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert "line 1" in refused(capfd, "report", str(tmp_path))


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.json", "metrics.jsonl"])
def test_a_report_shows_nothing_behind_a_link(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret words")
    (folder / "metrics.jsonl").write_text("")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    refused(capfd, "report", str(folder))
    assert not (folder / "report.html").exists()


def test_no_code_of_a_model_folder_is_run_or_asked_about(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ran = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    code = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (model / name).write_text(code)
    plain = {"model_type": "x", "architectures": ["X"]}
    maps = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for name in ("config.json", "tokenizer_config.json"):
        (model / "config.json").write_text(json.dumps({"model_type": "bert"}))
        (model / name).write_text(json.dumps({**plain, "auto_map": maps}))
        told = refused(capfd, "train", str(recipe), f"model={model}", "--dry-run")
        assert "never run" in told
    assert not ran.exists()


def test_an_unforeseen_error_is_a_line_a_report_and_exit_code_1(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by \x1b[31mchance\nhere")

    monkeypatch.setattr(Recipe, "load", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert app.run(["train", str(recipe)]) == 1
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert told.rstrip("\n").isprintable()
    found = re.search(r"the full report is in (\S+)", told)
    assert found is not None
    assert Path(found[1]).parent == tmp_path
    assert "Traceback" in Path(found[1]).read_text()
