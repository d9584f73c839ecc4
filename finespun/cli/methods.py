"""`finespun methods`: the structures there are, with formula and count."""

import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from finespun.contract import Structure

EXAMPLE = "finespun methods lsr"
LAYERS, WIDTH = 24, 768


def command(
    kind: Annotated[str | None, typer.Argument(help="One method, with all its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the ways to write an update: formula, source, and trained numbers at the defaults."""
    from finespun.methods.structures import STRUCTURES, structure

    found = [structure(kind)] if kind is not None else [cls() for cls in STRUCTURES.values()]
    if as_json:
        typer.echo(json.dumps({one.kind: facts(one) for one in found}, ensure_ascii=False))
        return
    for one in found:
        fact = facts(one)
        typer.echo(typer.style(f"{one.kind}  ({fact['source']})", bold=True))
        typer.echo(fact["formula" if kind is None else "about"])
        typer.echo(f"{fact['numbers']:,} numbers in {LAYERS} layers of {WIDTH} x {WIDTH}")
        if kind is not None:
            for name, value in fact["options"].items():
                typer.echo(f"  {name}: {json.dumps(value)}")
        typer.echo()


def facts(one: "Structure") -> dict[str, Any]:
    """What a structure says of itself."""
    import torch

    from finespun.contract import TensorSite

    about = inspect.getdoc(type(one)) or ""
    weight = torch.zeros(WIDTH, WIDTH)
    sites = [TensorSite(f"layer.{i}", weight, kind=one.site_kind) for i in range(LAYERS)]
    return {
        "source": one.source,
        "formula": about.partition("\n\n")[0],
        "about": about,
        "numbers": one.total_parameters(one.plan(sites)),
        "options": one.options(),
    }
