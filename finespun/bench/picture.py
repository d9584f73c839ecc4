"""The picture of a bench: the metric against trained numbers, with intervals."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from finespun.bench.summary import Row, Summary

COLOURS = ("#1b6ca8", "#c8553d", "#3b7d4f", "#7d5ba6", "#8a6d1d", "#4d4d4d")
MARKERS = "osD^vP"
STEADY = {"svg.hashsalt": "finespun", "svg.fonttype": "path"}


def draw(summary: Summary, stem: Path) -> list[Path]:
    """Write `stem`.svg and `stem`.png; the same summary gives the same SVG. Returns the paths.

    Members without trained numbers in the layers are dashed lines; diverged ones are left out.
    """
    with rc_context(STEADY):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        _lines(axes, summary)
        _points(axes, summary)
        axes.set_xlabel("trained numbers in the layers (the head left out)")
        axes.set_ylabel(f"{summary.metric}, mean and 95 % interval of {len(summary.seeds)} seeds")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="lower right")
        figure.supxlabel(summary.command, fontsize=7, family="monospace", color="#555555")
        paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
        about = {"Title": summary.metric, "Description": summary.command}
        figure.savefig(paths[0], metadata={**about, "Date": None})
        figure.savefig(paths[1], dpi=160, metadata=about)
    return paths


def _lines(axes: Axes, summary: Summary) -> None:
    for row in summary.rows:
        if row.update_numbers == 0 and row.mean is not None:
            axes.axhline(row.mean, ls="--", lw=1.2, color="#888888", label=row.name)
            if row.half is not None:
                low, high = row.mean - row.half, row.mean + row.half
                axes.axhspan(low, high, color="#888888", alpha=0.12, lw=0)


def _points(axes: Axes, summary: Summary) -> None:
    groups: dict[str, list[Row]] = {}
    for row in summary.rows:
        if row.update_numbers and row.mean is not None:
            groups.setdefault(row.structure.kind, []).append(row)
    for place, rows in enumerate(groups.values()):
        axes.errorbar(
            [row.update_numbers for row in rows],
            [row.mean or 0.0 for row in rows],
            yerr=[row.half or 0.0 for row in rows],
            fmt=MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            capsize=3,
            label=rows[0].name.split()[0],
        )
        for row in rows:
            axes.annotate(
                row.name,
                (row.update_numbers, row.mean or 0.0),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=7,
            )
    if groups:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
