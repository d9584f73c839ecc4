"""`finespun convert`: an adapter made into another, on files."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from finespun.cli.screen import echo

if TYPE_CHECKING:
    from finespun.lifecycle.conversion import Converted

EXAMPLE = "finespun convert out/trec-lsr-small out/squeezed --to lora --set rank=2"


def command(
    src: Annotated[str, typer.Argument(help="An adapter: a folder, or a file of one.")],
    dst: Annotated[str, typer.Argument(help="The folder to write; for kohya's format a file.")],
    to: Annotated[str, typer.Option(help="A structure; lora without rank or energy is exact.")],
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the new structure, as rank=8; may be repeated."),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="For lora: the share of ‖ΔW‖² that every layer keeps.")
    ] = None,
    refine: Annotated[
        int, typer.Option(min=0, help="For lsr: steps that lower the error further.")
    ] = 0,
    max_error: Annotated[
        float | None, typer.Option(min=0.0, help="Refuse a larger relative error of any layer.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base, where updates depend on its weights or sizes.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="native, or a LoRA as peft, diffusers or kohya writes it.")
    ] = "native",
    part: Annotated[
        str | None, typer.Option(help="The part of a pipeline to take or write: unet, ...")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter that is there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter as a smaller LoRA, an LSR or any other structure; what every layer loses is
    printed.

    No model is loaded.
    """
    from finespun.lifecycle.conversion import convert

    made = convert(
        src,
        dst,
        wanted(to, options or []),
        refine,
        max_error,
        energy,
        None if model is None else base_folder(model),
        cast(Any, format),
        part,
        overwrite,
    )
    if as_json:
        echo(as_one_object(made))
        return
    width = max(map(len, made.errors))
    echo(f"{'layer':<{width}}  rank  predicted  true error")
    for name, error in made.errors.items():
        rank = made.ranks.get(name, "")
        predicted = f"{made.predicted[name]:.4f}" if name in made.predicted else ""
        echo(f"{name:<{width}}  {rank:>4}  {predicted:>9}  {error:>10.4f}")
    echo(str(made))


def as_one_object(made: "Converted") -> str:
    """What a conversion wrote, as JSON."""
    content = dataclasses.asdict(made) | {"folder": str(made.folder), "error": made.error}
    content["structure"] = {"kind": made.structure.kind, **made.structure.options()}
    return json.dumps(content, ensure_ascii=False)


def wanted(to: str, options: list[str]) -> Any:
    """The structure that the options describe; a bare word where there are none. Raises
    InputError."""
    from finespun.cli.explain import choose
    from finespun.errors import InputError

    for option in options:
        if "=" not in option:
            raise InputError(f"--set {option} gives no value; write --set {option}=8, say")
    if not options:
        return to
    return choose(to, options)


def base_folder(model: str) -> str:
    """The folder of a model by name. Raises FileError."""
    from finespun.models.zoo import find_model

    return find_model(model)
