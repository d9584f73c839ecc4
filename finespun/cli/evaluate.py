"""`finespun evaluate`: measure a trained adapter."""

from typing import Annotated

import typer

from finespun.cli.screen import echo

EXAMPLE = "finespun evaluate out/trec-lsr-small"


def command(
    adapter: Annotated[str, typer.Argument(help="The output folder of a finished run.")],
    file: Annotated[
        str | None, typer.Option(help="Another labelled table; without it, the held-out rows.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure an adapter on the rows that its recipe held out, or on another table."""
    from finespun.cli.train import shown
    from finespun.training.inference import Trained
    from finespun.training.progress import as_json as line

    metrics = Trained.open(adapter).evaluate(file)
    if as_json:
        echo(line(metrics))
        return
    width = max(map(len, metrics))
    for name, value in metrics.items():
        echo(f"{name:<{width}}  {shown(value)}")
