"""`finespun export`: PEFT's files, which other programs load."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "finespun export out/trec-lsr-small out/as-lora"


def command(
    adapter: Annotated[str, typer.Argument(help="The output folder of a finished run.")],
    out: Annotated[str, typer.Argument(help="The folder to write.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="LoRA's rank; without it, exact where possible.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(min=0.0, help="Refuse a larger relative error of any layer.")
    ] = None,
    per_module_rank: Annotated[
        bool, typer.Option(help="Every layer at its own rank: fewer numbers, for PEFT alone.")
    ] = False,
) -> None:
    """Write an adapter as a LoRA folder in PEFT's format, and say how exact it is."""
    from finespun.errors import InputError
    from finespun.train.use import Trained

    if Path(out).expanduser().resolve() == Path(adapter).expanduser().resolve():
        raise InputError(f"{out!r} is the adapter itself; name another folder")
    trained = Trained.open(adapter)
    with warnings.catch_warnings():  # what it warns of is printed
        warnings.simplefilter("ignore")
        typer.echo(
            str(trained.adapter.export(out, rank, max_error, per_module_rank=per_module_rank))
        )
