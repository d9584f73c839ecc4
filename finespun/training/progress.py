"""How a run reports its progress: a bar on a terminal, JSON lines elsewhere, nothing when quiet."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finespun.errors import FileError
from finespun.storage.visible import visible

Record = Mapping[str, Any]


def as_json(value: Any) -> str:
    """One line of strict JSON; a number that is not finite becomes null."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False)


class Reporter:
    """Hears of every event of a run and shows nothing; others subclass it.

    An event is a mapping with the key "event": "start" (steps, done), "step" (step, epoch, loss,
    lr, grad_norm, examples_per_second), "checkpoint" (step, diagnostics), "end", "note" (text),
    "evaluation" (when, metrics) or "result".
    """

    def tell(self, record: Record) -> None:
        """One event of the run."""

    def close(self) -> None:
        """The run is over or has failed."""


class Several(Reporter):
    """Tells each of several reporters in turn."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def tell(self, record: Record) -> None:
        for reporter in self.reporters:
            reporter.tell(record)


def worst(diagnostics: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """The largest value of every diagnostic over all layers.

    >>> worst({"query": {"condition_A": 2.0}, "value": {"condition_A": 3.5}})
    {'condition_A': 3.5}
    """
    found: dict[str, float] = {}
    for numbers in diagnostics.values():
        for name, value in numbers.items():
            if value is not None:
                found[name] = max(value, found.get(name, value))
    return found


class JsonLines(Reporter):
    """One JSON object a line on `stream`, for programs and logs.

    Steps are thinned to every `every`-th, and the last; 0 means about forty in a run. Of a
    checkpoint's diagnostics the worst of all layers is shown; metrics.jsonl has every layer's.
    """

    def __init__(self, stream: IO[str], every: int = 0) -> None:
        self.stream, self.every, self.steps = stream, every, 0

    def tell(self, record: Record) -> None:
        if record["event"] == "start":
            self.steps = record["steps"]
        every = self.every or max(1, self.steps // 40)
        if record["event"] == "step" and record["step"] % every and record["step"] != self.steps:
            return
        if record["event"] == "checkpoint":
            told = {"event": "checkpoint", "step": record["step"]}
            record = {**told, "worst": worst(record["diagnostics"])}
        self.stream.write(visible(as_json(record)) + "\n")
        self.stream.flush()


class Bar(Reporter):
    """A progress bar on the terminal: loss, learning rate, examples a second and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.progress: Progress | None = None
        self.loss: float | None = None

    def tell(self, record: Record) -> None:
        event = record["event"]
        if event == "start":
            self._start(record["steps"], record["done"])
        elif event == "step" and self.progress is not None:
            old = record["loss"] if self.loss is None else self.loss
            self.loss = 0.9 * old + 0.1 * record["loss"]
            about = (
                f"loss {self.loss:.3f}  lr {record['lr']:.1e}  "
                f"{record['examples_per_second']:.0f}/s"
            )
            self.progress.update(self.task, completed=record["step"], about=about)
        elif event == "evaluation":
            shown = "  ".join(f"{k} {v:.4f}" for k, v in record["metrics"].items())
            text = visible(f"{record['when']} training: {shown}")
            self.console.print(text, markup=False, highlight=False)
        elif event == "note":
            self.console.print(visible(record["text"]), markup=False, highlight=False)
        elif event == "end":
            self.close()

    def _start(self, steps: int, done: int) -> None:
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[about]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("training", total=steps, completed=done, about="")
        self.progress.start()

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class Log(Reporter):
    """A file of JSON lines that only grows, except when a run goes back to a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tell(self, record: Record) -> None:
        """Write one line. Raises FileError where that cannot be done."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(as_json(record) + "\n")
        except OSError as error:
            raise FileError(f"{str(self.path)!r} cannot be written: {error.strerror}") from error

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def past(self) -> list[Record]:
        """Events that were reported earlier."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.size else []
        return [json.loads(line) for line in lines]

    def cut(self, size: int) -> None:
        """Forget what was written after the first `size` bytes."""
        if self.size > size:
            os.truncate(self.path, size)
