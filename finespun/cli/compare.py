"""`finespun compare`: two adapters, or two runs, side by side."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finespun.cli.screen import echo

if TYPE_CHECKING:
    from finespun.lifecycle.conversion.facts import Comparison

EXAMPLE = "finespun compare out/trec-lsr-small out/squeezed"
COLUMNS = ("norm_a", "norm_b", "cosine", "distance", "inputs", "outputs")


def command(
    a: Annotated[str, typer.Argument(help="An adapter folder or the output folder of a run.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    model: Annotated[
        str | None, typer.Option(help="The base, where updates depend on its weights (DoRA, ...).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two adapters layer by layer, and their metrics where both are runs.

    cosine and distance of the updates; inputs and outputs are the overlap of the subspaces that
    they read and write, 1 where the smaller lies in the larger. No model is loaded.
    """
    from finespun.cli.convert import base_folder
    from finespun.lifecycle.conversion.facts import compare
    from finespun.training.progress import as_json as line

    found = compare(a, b, None if model is None else base_folder(model))
    metrics = run_table(a, b)
    if as_json:
        echo(line({**dataclasses.asdict(found), "runs": metrics}))
        return
    show(found, metrics)


def run_table(a: str, b: str) -> dict[str, list[Any]]:
    """Name -> the figure of either run; empty unless both folders hold a finished run."""
    from finespun.training.output import RESULT, Result

    if not all((Path(folder) / RESULT).is_file() for folder in (a, b)):
        return {}
    runs = [Result.read(folder) for folder in (a, b)]
    names = [n for n in runs[0].after if n in runs[1].after]
    found: dict[str, list[Any]] = {f"{n} before": [r.before.get(n) for r in runs] for n in names}
    found |= {f"{n} after": [r.after[n] for r in runs] for n in names}
    for name in (
        "num_update_parameters",
        "num_module_parameters",
        "adapter_bytes",
        "steps",
        "loss",
        "seconds",
    ):
        found[name] = [getattr(r, name) for r in runs]
    return found


def show(found: "Comparison", metrics: dict[str, list[Any]]) -> None:
    """Print the comparison as tables."""
    width = max(map(len, ["all layers", *(site.name for site in found.sites)]))
    echo(f"{'layer':<{width}}" + "".join(f"{c:>10}" for c in COLUMNS))
    for site in found.sites:
        cells = "".join(f"{number(getattr(site, column)):>10}" for column in COLUMNS)
        echo(f"{site.name:<{width}}{cells}")
    cells = "".join(f"{number(x):>10}" for x in (found.cosine, found.distance))
    echo(f"{'all layers':<{width}}{'':>20}{cells}")
    for label, names in (("first", found.only_a), ("second", found.only_b)):
        if names:
            echo(f"only in the {label}: {', '.join(names)}")
    if metrics:
        wide = max(map(len, metrics))
        echo()
        for name, values in metrics.items():
            echo(f"{name:<{wide}}" + "".join(f"{number(v):>14}" for v in values))


def number(value: float | None) -> str:
    """A whole number with commas, another with four digits."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
