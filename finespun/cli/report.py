"""`finespun report`: a page about a run or a bench."""

import json
from typing import Annotated

import typer

from finespun.cli.screen import echo

EXAMPLE = "finespun report out/trec-lsr-small"


def command(
    folder: Annotated[str, typer.Argument(help="The output folder of a run or of a bench.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write report.html into a folder: curves, tables, the update layer by layer, the recipe.

    The page stands alone and needs no network. No model is loaded.
    """
    from finespun.report import report

    page = str(report(folder))
    echo(json.dumps({"written": page}) if as_json else f"{page} written")
