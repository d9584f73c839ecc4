"""The page of a run: result, curves, the update layer by layer, recipe and origin."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finespun.adapters.deltas import Deltas, update_of
from finespun.bench.spec import describe
from finespun.errors import FileError, InputError
from finespun.files import Saved, read_adapter
from finespun.report.figure import Curve, Point, curves, smoothed
from finespun.report.page import code, document, paragraph, section, table
from finespun.storage.blame import blame
from finespun.storage.safe_io import parse_json, read_text
from finespun.training.output import ADAPTER, LOG, RECIPE, RESULT, Result

TOP_VALUES = 3
FIGURES = (
    "sites",
    "num_update_parameters",
    "num_module_parameters",
    "adapter_bytes",
    "train_rows",
    "test_rows",
    "steps",
    "loss",
    "seconds",
    "peak_memory",
    "threads",
)
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """One site's update: its norm ‖ΔW‖ and its largest singular values, falling."""

    name: str
    shape: str
    norm: float
    values: tuple[float, ...]


def run_page(folder: Path) -> str:
    """The HTML page of a run, finished or not. Raises FileError for a file that cannot be read."""
    log = read_log(folder / LOG)
    result = _result_of(folder) if (folder / RESULT).is_file() else None
    saved = read_adapter(folder) if (folder / ADAPTER[1]).is_file() else None
    recipe = folder / RECIPE
    text = read_text(recipe) if recipe.is_file() else ""
    lead = "A run of Finespun." if result else "A run that has not ended: what is known of it."
    sections = [
        section("Result", *_result(log, result)),
        section("Training", _figures(log)),
        section("The update, layer by layer", *_layers(saved)),
        section("Recipe", code(text, "recipe") if text else ""),
        section("Origin", *_origin(saved, result)),
    ]
    return document(f"Run: {folder.resolve().name}", lead, sections)


def _result_of(folder: Path) -> Record:
    """metrics.json of a run, its figures checked. Raises FileError."""
    values = dataclasses.asdict(Result.read(folder))
    with blame(folder / RESULT):
        for name in ("before", "after"):
            checked_metrics(values[name], name)
        for name in FIGURES:
            _figure(values[name], name)
    return values


def read_log(path: Path) -> list[Record]:
    """The events of metrics.jsonl; a last line that a crash cut short is left out. Raises FileError
    for any other line that is no event."""
    lines = read_text(path).split("\n")
    found: list[Record] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            event = parse_json(line.encode(), f"{str(path)!r}, line {number}")
            checked_event(event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            told = f"{str(path)!r}, line {number} is no event of a run"
            raise FileError(f"{told}: {error!r}") from error
        found.append(event)
    return found


def checked_event(event: Record) -> None:
    """Raise KeyError, TypeError or ValueError for an event without what this page shows of it."""
    kind = event["event"]
    if not isinstance(kind, str):
        raise TypeError("event must be text")
    if kind == "step":
        for name in ("step", "loss", "lr", "grad_norm"):
            if event.get(name) is not None:
                float(_figure(event[name], name))
        _figure(event["step"], "step")
    if kind == "evaluation":
        if not isinstance(event["when"], str):
            raise TypeError("when must be text")
        checked_metrics(event["metrics"], "metrics")
    if kind == "note" and not isinstance(event["text"], str):
        raise TypeError("text must be text")


def checked_metrics(values: Any, where: str) -> None:
    """Raise TypeError unless these are figures by name."""
    if not isinstance(values, dict):
        raise TypeError(f"{where} must be an object")
    for name, value in values.items():
        if value is not None:
            _figure(value, name)


def _figure(value: Any, name: str) -> float:
    if type(value) not in (int, float) or abs(value) > sys.float_info.max:
        raise TypeError(f"{name} must be a figure, got {str(value)[:40]!r}")
    return value


# --- result --------------------------------------------------------------------------------------
def _result(log: list[Record], result: Record | None) -> list[str]:
    told = {e["when"]: e["metrics"] for e in log if e["event"] == "evaluation"}
    before = result["before"] if result else told.get("before", {})
    after = result["after"] if result else told.get("after", {})
    rows = [
        (name, before.get(name), after.get(name), _gain(before.get(name), after.get(name)))
        for name in dict.fromkeys([*before, *after])
    ]
    parts = [table(("metric", "before", "after", "change"), rows, "On the held-out rows")]
    if result is not None:
        facts = [
            ("trained parameters in layers", result["num_update_parameters"]),
            ("layers", result["sites"]),
            ("trained parameters in modules", result["num_module_parameters"]),
            ("adapter, bytes on disk", result["adapter_bytes"]),
            ("rows to train on", result["train_rows"]),
            ("rows held out", result["test_rows"]),
            ("steps", result["steps"]),
            ("loss, mean of the last epoch", result["loss"]),
            ("seconds in training steps", result["seconds"]),
            ("peak memory of the process, MB", round(result["peak_memory"] / 1e6)),
            ("threads", result["threads"]),
        ]
        parts.append(table(("figure", "value"), facts, "The run in figures"))
    notes = [str(event["text"]) for event in log if event["event"] == "note"]
    return [*parts, *map(paragraph, notes)]


def _gain(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


# --- curves --------------------------------------------------------------------------------------
def _figures(log: list[Record]) -> str:
    steps = [event for event in log if event["event"] == "step"]
    loss, lr, grad = (_series(steps, name) for name in ("loss", "lr", "grad_norm"))
    drawn = [
        curves(
            "Training loss, each step and running mean",
            [Curve("loss", loss, faint=True), Curve("loss", smoothed(loss))],
            "step",
            "loss",
        ),
        curves("Learning rate", [Curve("lr", lr)], "step", "lr"),
        curves(
            "Gradient norm before clipping, running mean",
            [Curve("norm", grad, faint=True), Curve("norm", smoothed(grad))],
            "step",
            "norm",
        ),
    ]
    held = "\n".join(figure for figure in drawn if figure)
    return f'<div class="figures">\n{held}\n</div>' if held else ""


def _series(steps: list[Record], name: str) -> list[Point]:
    found = [(event["step"], event.get(name)) for event in steps]
    return [(float(step), float(v)) for step, v in found if v is not None and math.isfinite(v)]


# --- layers --------------------------------------------------------------------------------------
def layers(saved: Saved) -> list[Layer]:
    """Every site's update, from the saved tensors alone. Raises InputError where an update depends
    on the base weight or is no change of a weight."""
    deltas = Deltas(saved.state)
    found = []
    for name, delta in deltas.items():
        shape = delta.site.shape
        with torch.no_grad():
            update = update_of(delta, saved.state.strength)
            values = update.singular_values()[:TOP_VALUES].tolist()
            norm = float(update.norm())
        size = f"{shape.out_features} x {shape.in_features}"
        found.append(Layer(name, size, norm, tuple(values)))
    return found


def _layers(saved: Saved | None) -> list[str]:
    if saved is None or not saved.state.plan.sites:
        return []
    told = paragraph(f"{describe(saved.state.structure)}, strength {saved.state.strength:g}.")
    try:
        found = layers(saved)
    except InputError as error:
        return [told, paragraph(f"Norms cannot be computed from the files alone: {error}.")]
    most = max(layer.norm for layer in found) or 1.0
    rows = [
        (
            layer.name,
            layer.shape,
            layer.norm,
            layer.norm / most,
            *(layer.values[i] if i < len(layer.values) else None for i in range(TOP_VALUES)),
        )
        for layer in found
    ]
    heads = ("layer", "shape", "‖ΔW‖", "share of the largest", *(f"σ{i + 1}" for i in range(3)))
    caption = "Frobenius norm and largest singular values of every update"
    return [told, table(heads, rows, caption, bars={3})]


# --- origin --------------------------------------------------------------------------------------
def _origin(saved: Saved | None, result: Record | None) -> list[str]:
    if saved is None:
        return []
    facts: list[tuple[str, str]] = [("adapter", saved.state.name)]
    if saved.state.base is not None:
        facts.append(("base", str(saved.state.base)))
    facts.append(("sha256 of the tensors", saved.sha256))
    made = saved.state.lineage
    if made is not None:
        facts.append(("made", made.created))
        facts += [(f"made from {parent.name}", parent.sha256) for parent in made.parents]
        facts += [(f"seed of {name}", str(seed)) for name, seed in made.seeds.items()]
    if result is not None and (classes := result["task"].get("classes")):
        facts.append(("classes", ", ".join(classes)))
    parts = [table(("what", "value"), facts, "Where the adapter comes from")]
    if made is not None:
        parts.append(table(("package", "version"), made.versions.items(), "Made with"))
    return parts
