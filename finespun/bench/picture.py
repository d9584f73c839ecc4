"""The picture of a bench: the metric against trained parameters, with intervals."""

from pathlib import Path
from typing import TYPE_CHECKING

from finespun.bench.spec import describe
from finespun.bench.summary import Row, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1b6ca8", "#c8553d", "#3b7d4f", "#7d5ba6", "#8a6d1d", "#4d4d4d")
MARKERS = "osD^vP"
STEADY = {"svg.hashsalt": "finespun", "svg.fonttype": "path"}


def draw(summary: Summary, stem: Path) -> list[Path]:
    """Write `stem`.svg and `stem`.png; the same summary gives the same SVG. Returns the paths.

    Members without trained parameters in the layers are dashed lines; diverged ones are left out.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STEADY):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        _lines(axes, summary)
        _points(axes, summary)
        axes.set_xlabel("trained parameters in the layers (the head left out)")
        axes.set_ylabel(f"{summary.metric}, mean and 95 % interval of {len(summary.seeds)} seeds")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        figure.supxlabel(summary.command, fontsize=7, family="monospace", color="#555555")
        paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
        about = {"Title": summary.metric, "Description": summary.command}
        figure.savefig(paths[0], metadata={**about, "Date": None})
        figure.savefig(paths[1], dpi=160, metadata=about)
    return paths


def _lines(axes: "Axes", summary: Summary) -> None:
    for row in summary.rows:
        if row.num_update_parameters == 0 and row.mean is not None:
            axes.axhline(row.mean, ls="--", lw=1.2, color="#888888", label=row.name)
            if row.half is not None:
                low, high = row.mean - row.half, row.mean + row.half
                axes.axhspan(low, high, color="#888888", alpha=0.12, lw=0)


def _points(axes: "Axes", summary: Summary) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    groups: dict[str, list[Row]] = {}
    for row in summary.rows:
        if row.num_update_parameters and row.mean is not None:
            groups.setdefault(row.structure.kind, []).append(row)
    for place, rows in enumerate(groups.values()):
        axes.errorbar(
            [row.num_update_parameters for row in rows],
            [row.mean or 0.0 for row in rows],
            yerr=[row.half or 0.0 for row in rows],
            fmt=MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            capsize=3,
            label=describe(rows[0].structure).split()[0],
        )
        above = place % 2 == 0  # names of one kind over their intervals, of the next kind under
        for row in rows:
            reach = row.half or 0.0
            axes.annotate(
                row.name,
                (row.num_update_parameters, (row.mean or 0.0) + (reach if above else -reach)),
                xytext=(0, 6 if above else -6),
                va="bottom" if above else "top",
                ha="center",
                textcoords="offset points",
                color=COLOURS[place % len(COLOURS)],
                fontsize=7.5,
            )
    if groups:
        axes.margins(x=0.14, y=0.08)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
