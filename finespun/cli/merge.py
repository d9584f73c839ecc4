"""`finespun merge`: an adapter folded into its base."""

import dataclasses
import json
from typing import Annotated

import typer

from finespun.cli.screen import echo

EXAMPLE = "finespun merge out/trec-lsr-small out/whole"


def command(
    adapter: Annotated[str, typer.Argument(help="The output folder of a run, or any adapter.")],
    out: Annotated[str, typer.Argument(help="The folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="The base; without it, the one that the recipe names.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that is there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the adapted model as a transformers folder: weights, config, tokenizer, head."""
    from finespun.lifecycle.export import merge

    done = merge(adapter, out, model, overwrite)
    if as_json:
        content = {**dataclasses.asdict(done), "folder": str(done.folder)}
        echo(json.dumps(content, ensure_ascii=False))
    else:
        echo(str(done))
