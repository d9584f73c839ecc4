"""`finespun init`: a first recipe for a table of one's own."""

import json
from pathlib import Path
from typing import Annotated

import typer

from finespun.cli.screen import echo

EXAMPLE = "finespun init examples/support.csv minilm-l6 --out support.yaml"


def command(
    data: Annotated[str, typer.Argument(help="A .csv, .tsv, .jsonl or .parquet file.")],
    model: Annotated[str, typer.Argument(help="minilm-l6, minilm-l3, a folder or a hub model.")],
    out: Annotated[str | None, typer.Option(help="Write here; without it, print.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the recipe, or the file's name, as one object.")
    ] = False,
) -> None:
    """Write a commented recipe for a table: columns, labels, targets and sizes are guessed."""
    from finespun.cli.schema import write_new
    from finespun.errors import InputError
    from finespun.recipes.suggest import suggest_recipe
    from finespun.recipes.yaml import read_yaml

    if out is not None and Path(out).exists() and not overwrite:
        raise InputError(f"{out!r} exists; choose another name, or --overwrite to replace it")
    text = suggest_recipe(data, model)
    if out is not None:
        write_new(out, text, overwrite)
        told = json.dumps({"written": out})
        echo(told if as_json else f"{out} written. Next: finespun train {out}")
    elif as_json:
        echo(json.dumps(read_yaml(text, "recipe")[0], ensure_ascii=False))
    else:
        echo(text, nl=not text.endswith("\n"))
