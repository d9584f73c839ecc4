"""The page of a bench: its table, accuracy by trained parameters, the learning rates tried."""

import csv
import io
import math
from pathlib import Path
from typing import Any

from finespun.bench.run import SHEET, TABLE
from finespun.bench.trials import FILE
from finespun.errors import FileError
from finespun.report.figure import Curve, Mean, Point, curves, intervals
from finespun.report.page import Cell, code, document, paragraph, section, table
from finespun.storage.safe_io import parse_json, read_text

COLUMNS = {
    "member": "member",
    "num_update_parameters": "trained parameters",
    "num_head_parameters": "head",
    "adapter_bytes": "adapter bytes",
    "best_lr": "best learning rate",
    "mean": "mean",
    "half_interval_95": "± (95 %)",
    "runs": "runs",
    "seconds": "seconds",
}
WHOLE = ("num_update_parameters", "num_head_parameters", "adapter_bytes", "runs")


def bench_page(folder: Path) -> str:
    """The HTML page of a finished bench. Raises FileError for a file that cannot be read."""
    rows = read_sheet(folder / SHEET)
    metric, seeds = told_metric(rows[0])
    lead = f"A comparison by {metric}: every member at its own best learning rate, {seeds} seeds."
    rows.sort(key=lambda row: -float(row["mean"]) if row["mean"] else math.inf)
    cells = [[_cell(key, row[key]) for key in COLUMNS] for row in rows]
    if rows[0]["mean"]:
        cells[0][0] = f"★ {rows[0]['member']} (highest mean)"
    figures = [_means(rows, metric), *_rates(folder / FILE, metric)]
    drawn = "\n".join(figure for figure in figures if figure)
    sections = [
        section(
            "Result",
            table(tuple(COLUMNS.values()), cells, f"{metric} on the held-out rows"),
            *map(paragraph, remarks(folder / TABLE)),
        ),
        section("Figures", f'<div class="figures">\n{drawn}\n</div>' if drawn else ""),
        section("Made by", code(rows[0]["command"], "command")),
    ]
    return document(f"Bench: {folder.resolve().name}", lead, sections)


def read_sheet(path: Path) -> list[dict[str, str]]:
    """Rows of table.csv by column. Raises FileError where a column is missing."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise FileError(f"{str(path)!r} is no table: {error}") from error
    missing = [name for name in (*COLUMNS, "command") if not rows or rows[0].get(name) is None]
    if missing:
        raise FileError(f"{str(path)!r} has no column {missing[0]!r}; let finespun bench write it")
    return rows


def told_metric(row: dict[str, str]) -> tuple[str, int]:
    """The metric and the number of seeds, from the columns METRIC_seed_NUMBER."""
    names = [name for name in row if "_seed_" in name]
    return (names[0].rpartition("_seed_")[0] if names else "the metric"), len(names)


def remarks(path: Path) -> list[str]:
    """The paragraphs under the table of table.md, the command left out; none without the file."""
    if not path.is_file():
        return []
    parts = read_text(path).split("\n\n")
    lines = ["\n".join(line for line in p.splitlines() if not line.startswith("|")) for p in parts]
    return [line for line in lines if line.strip() and not line.startswith("Made by: ")]


def _cell(key: str, text: str) -> Cell:
    if key == "member" or not text:
        return text or None
    return int(text) if key in WHOLE else float(text)


def _means(rows: list[dict[str, str]], metric: str) -> str:
    means = [
        Mean(
            row["member"],
            row["member"].split()[0],
            float(row["num_update_parameters"]),
            float(row["mean"]),
            float(row["half_interval_95"]) if row["half_interval_95"] else None,
        )
        for row in rows
        if row["mean"]
    ]
    title = f"{metric} against trained parameters in the layers, with 95 % intervals"
    return intervals(title, means, "trained parameters", metric)


def _rates(path: Path, metric: str) -> list[str]:
    """For every member the metric of its longest searches at every learning rate that was tried."""
    if not path.is_file():
        return []
    found: dict[str, dict[int, list[Point]]] = {}
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            record: dict[str, Any] = parse_json(line.encode(), f"{str(path)!r}, line {number}")
            training, value = record["recipe"]["training"], record["metrics"].get(metric)
            if record["held"] is not None and value is not None:
                points = found.setdefault(record["member"], {})
                points.setdefault(training["epochs"], []).append((training["lr"], value))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{str(path)!r}, line {number} is no trial: {error}") from error
    drawn = []
    for member, by_epochs in found.items():
        lines = [
            Curve(f"{n} epoch{'s' * (n > 1)}", sorted(p)) for n, p in sorted(by_epochs.items())
        ]
        title = f"{member}: {metric} in the search, by learning rate"
        drawn.append(curves(title, lines, "lr", metric, log_x=True))
    return drawn
