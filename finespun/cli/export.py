"""`finespun export`: files that other programs load: PEFT's, diffusers' or kohya's."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from finespun.cli.screen import echo

if TYPE_CHECKING:
    from finespun.adapter import Adapter

EXAMPLE = "finespun export out/trec-lsr-small out/as-lora"


def command(
    adapter: Annotated[str, typer.Argument(help="The output folder of a run, or any adapter.")],
    out: Annotated[str, typer.Argument(help="The folder to write; for kohya's format a file.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="LoRA's rank; without it, exact where possible.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(min=0.0, help="Refuse a larger relative error of any layer.")
    ] = None,
    per_module_rank: Annotated[
        bool, typer.Option(help="Every layer at its own rank: fewer parameters, for PEFT alone.")
    ] = False,
    allow_full: Annotated[
        bool,
        typer.Option(
            "--allow-full/--no-allow-full",
            help="Write trained modules (a head) too; vLLM, SGLang and llama.cpp refuse them.",
        ),
    ] = True,
    format: Annotated[
        str, typer.Option(help="peft, or one file as diffusers or kohya writes it.")
    ] = "peft",
    part: Annotated[
        str | None,
        typer.Option(help="The part of a pipeline: unet, transformer, text_encoder, ..."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The base: a folder or a known name; without it, the recipe's."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter that is there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter as a LoRA folder in PEFT's format, or as one file that diffusers or kohya's
    scripts load, and say how exact it is."""
    from finespun.cli.convert import as_one_object as converted
    from finespun.errors import InputError
    from finespun.files import check_source, refuse_to_lose

    check_source(adapter, out)
    if format != "peft":
        if per_module_rank:
            raise InputError("per_module_rank is for PEFT's format")
        made = without_model(
            adapter, out, rank, max_error, model, format, part, overwrite, allow_full
        )
        echo(converted(made) if as_json else str(made))
        return
    if part is not None:
        raise InputError("part belongs to --format diffusers and --format kohya")
    refuse_to_lose(out, format, overwrite)
    held = with_model(Path(adapter), model)
    with warnings.catch_warnings():  # what it warns of is printed
        warnings.simplefilter("ignore")
        done = held.export(out, rank, max_error, allow_full, per_module_rank=per_module_rank)
    told = {**dataclasses.asdict(done), "folder": str(done.folder), "error": done.error}
    echo(json.dumps(told, ensure_ascii=False) if as_json else as_option(str(done)))


def as_option(text: str) -> str:
    """The text with the argument of Python's as that of the command line."""
    return text.replace("allow_full=False", "--no-allow-full")


def with_model(adapter: Path, model: str | None) -> "Adapter":
    """The adapter on its base: `model`, or the one that its recipe names."""
    from finespun.lifecycle.export import base_folder, on_base

    base_folder(adapter, model)
    return on_base(adapter, model)[0]


def without_model(
    adapter: str,
    out: str,
    rank: int | None,
    max_error: float | None,
    model: str | None,
    format: str,
    part: str | None,
    overwrite: bool,
    allow_full: bool,
) -> Any:
    """The conversion from files to a file; no model is loaded."""
    from finespun.cli.convert import base_folder
    from finespun.lifecycle.conversion import convert
    from finespun.methods.structures import LoRA

    target = "lora" if rank is None else LoRA(rank=rank)
    base = None if model is None else base_folder(model)
    return convert(
        adapter,
        out,
        target,
        max_error=max_error,
        model=base,
        format=cast(Any, format),
        part=part,
        overwrite=overwrite,
        allow_full=allow_full,
    )
