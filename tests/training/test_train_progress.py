"""How a run reports its progress: JSON lines, the bar, the log file."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from finespun.errors import FileError
from finespun.training.progress import Bar, JsonLines, Log, as_json, worst


def test_json_lines_are_thinned_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with path.open("w") as stream:
        lines = JsonLines(stream)
        lines.tell({"event": "start", "steps": 410, "done": 0})
        for step in range(1, 411):
            lines.tell({"event": "step", "step": step, "loss": float("nan")})
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in told[1:]] == [*range(10, 411, 10)]
    assert told[1]["loss"] is None
    assert json.loads(as_json({"a": [float("inf"), {"b": (1.5, "ü")}]})) == {
        "a": [None, {"b": [1.5, "ü"]}]
    }


def test_a_line_about_a_checkpoint_tells_the_worst_layer(tmp_path: Path) -> None:
    text = io.StringIO()
    health = {f"layer.{i}": {"condition_A": float(i), "condition_B": None} for i in range(50)}
    JsonLines(text).tell({"event": "checkpoint", "step": 7, "diagnostics": health})
    told = json.loads(text.getvalue())
    assert told == {"event": "checkpoint", "step": 7, "worst": {"condition_A": 49.0}}
    assert worst({}) == {}


def test_the_bar_shows_loss_rate_and_speed() -> None:
    text = io.StringIO()
    bar = Bar(Console(file=text, force_terminal=True, width=100))
    step = {"event": "step", "epoch": 0.5, "grad_norm": 1.0, "examples_per_second": 123.0}
    bar.tell({"event": "evaluation", "when": "before", "metrics": {"accuracy": 0.25}})
    bar.tell({"event": "start", "steps": 8, "done": 3})
    bar.tell({**step, "step": 4, "loss": 0.75, "lr": 1e-3})
    bar.tell({"event": "note", "text": "a [note]"})
    bar.close()
    shown = text.getvalue()
    for part in (
        "before training: accuracy 0.2500",
        "loss 0.750",
        "1.0e-03",
        "123/s",
        "4/8",
        "a [note]",
    ):
        assert part in shown, part


def test_a_log_can_go_back(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    assert log.size == 0
    log.tell({"step": 1})
    size = log.size
    log.tell({"step": 2})
    log.cut(size)
    log.tell({"step": 3})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 3]
    log.cut(10**6)
    assert len(log.path.read_text().splitlines()) == 2


def test_a_full_disk_under_the_log_is_told() -> None:
    with pytest.raises(FileError, match=r"'/dev/full' cannot be written: No space left"):
        Log(Path("/dev/full")).tell({"event": "step"})
