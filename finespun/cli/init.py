"""`finespun init`: a first recipe for a table of one's own."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "finespun init examples/support.csv minilm-l6 --out support.yaml"


def command(
    data: Annotated[str, typer.Argument(help="A .csv, .tsv, .jsonl or .parquet file.")],
    model: Annotated[str, typer.Argument(help="minilm-l6, minilm-l3, a folder or a hub model.")],
    out: Annotated[str | None, typer.Option(help="Write here; without it, print.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a commented recipe for a table: columns, labels, targets and sizes are guessed."""
    from finespun.errors import InputError
    from finespun.files import write_file
    from finespun.train.suggest import suggest_recipe

    if out is not None and Path(out).exists() and not force:
        raise InputError(f"{out!r} exists; choose another name, or --force to replace it")
    text = suggest_recipe(data, model)
    if out is None:
        typer.echo(text, nl=not text.endswith("\n"))
        return
    write_file(out, text)
    typer.echo(f"{out} written. Next: finespun train {out}")
