"""`finespun report`: a page about a run or a bench."""

from typing import Annotated

import typer

EXAMPLE = "finespun report out/trec-lsr-small"


def command(
    folder: Annotated[str, typer.Argument(help="The output folder of a run or of a bench.")],
) -> None:
    """Write report.html into a folder: curves, tables, the update layer by layer, the recipe.

    The page stands alone and needs no network. No model is loaded.
    """
    from finespun.report import report

    typer.echo(f"{report(folder)} written")
