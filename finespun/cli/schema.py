"""`finespun schema`: what a recipe may hold, for editors and other programs."""

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "finespun schema --out recipe.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def command(
    out: Annotated[str | None, typer.Option(help="Write here; without it, print.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Print the JSON schema of recipes, every method and its options included.

    An editor with a YAML language server checks and completes a recipe whose first line is
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from finespun.errors import InputError
    from finespun.files import write_file
    from finespun.recipe import Recipe

    if out is not None and Path(out).exists() and not force:
        raise InputError(f"{out!r} exists; choose another name, or --force to replace it")
    schema = {"$schema": DIALECT, **Recipe.json_schema()}
    text = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    write_file(out, text)
    typer.echo(f"{out} written")
