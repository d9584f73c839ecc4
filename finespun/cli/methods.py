"""`finespun methods`: what there is on every axis, structures with formula and count."""

import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finespun.cli.screen import echo

if TYPE_CHECKING:
    from finespun.contract import Method, Structure

EXAMPLE = "finespun methods lsr"
LAYERS, WIDTH = 24, 768


def command(
    kind: Annotated[str | None, typer.Argument(help="One method, with all its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the methods of every axis: what they do, source, trained parameters at the defaults."""
    from finespun.methods.axes import AXES, axis_of

    if kind is not None:
        found = [axis_of(kind).make(kind)]
    else:
        found = [cls() for axis in AXES.values() for cls in axis.known.values()]
    if as_json:
        echo(json.dumps({one.kind: facts(one) for one in found}, ensure_ascii=False))
        return
    for one in found:
        name, *rest = lines(one, whole=kind is not None)
        echo(name, bold=True)
        echo("\n".join(rest) + "\n")


def lines(one: "Method", whole: bool) -> list[str]:
    """What is printed of a method; its whole description and options only where asked."""
    fact = facts(one)
    axis = "" if fact["axis"] == "structure" else f"{fact['axis']}, "
    told = [
        f"{one.kind}  ({axis}{fact['source']})",
        fact["about" if whole else "formula"],
    ]
    if "num_parameters" in fact:
        told.append(
            f"{fact['num_parameters']:,} parameters in {LAYERS} layers of {WIDTH} x {WIDTH}"
        )
    if fact["needs"]:
        told.append(f"needs {', '.join(fact['needs'])}")
    if whole:
        told += [f"  {name}: {json.dumps(value)}" for name, value in fact["options"].items()]
    return told


def facts(one: "Method") -> dict[str, Any]:
    """What a method says of itself; of a structure its count as well."""
    from finespun.contract import Structure

    about = inspect.getdoc(type(one)) or ""
    counted = {"num_parameters": count(one)} if isinstance(one, Structure) else {}
    return {
        "axis": one.axis,
        "source": one.source,
        "formula": about.partition("\n\n")[0],
        "about": about,
        **counted,
        "needs": sorted(one.needs),
        "options": one.options(),
    }


def count(one: "Structure") -> int:
    """Trained parameters in the layers that all structures are compared on."""
    import torch

    from finespun.contract import TensorSite

    weight = torch.zeros(WIDTH, WIDTH)
    sites = [TensorSite(f"layer.{i}", weight, kind=one.site_kind) for i in range(LAYERS)]
    return one.total_parameters(one.plan(sites))
