"""`finespun schema`: what a recipe or a bench file may hold, for editors and other programs."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from finespun.cli.screen import echo

EXAMPLE = "finespun schema --out recipe.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Kind(StrEnum):
    """Kinds of files."""

    RECIPE = "recipe"
    BENCH = "bench"


def command(
    kind: Annotated[Kind, typer.Argument(help="recipe, or bench for bench files.")] = Kind.RECIPE,
    out: Annotated[str | None, typer.Option(help="Write here; without it, print.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --out: report the file as one JSON object.")
    ] = False,
) -> None:
    """Print the JSON schema of recipes or bench files, every method and its options included.

    An editor with a YAML language server checks and completes a recipe whose first line is
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    text = json.dumps(schema_of(kind), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        echo(text, nl=False)
    else:
        write_new(out, text, overwrite)
        echo(json.dumps({"written": out}) if as_json else f"{out} written")


def schema_of(kind: Kind) -> dict[str, Any]:
    """The schema of one kind of file."""
    if kind is Kind.RECIPE:
        from finespun.recipes.recipe import Recipe

        return {"$schema": DIALECT, **Recipe.json_schema()}
    from finespun.bench import BenchSpec

    return {"$schema": DIALECT, **BenchSpec.json_schema()}


def write_new(out: str, text: str, overwrite: bool) -> None:
    """Write a file that is not there yet, or replace it. Raises InputError."""
    from finespun.errors import InputError
    from finespun.storage.atomic import write_file

    if Path(out).exists() and not overwrite:
        raise InputError(f"{out!r} exists; choose another name, or --overwrite to replace it")
    write_file(out, text)
