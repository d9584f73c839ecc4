"""`finespun explain`: one method, at your layers' shapes."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finespun.cli.screen import echo
from finespun.errors import InputError

if TYPE_CHECKING:
    from finespun.contract import Site, Structure

EXAMPLE = "finespun explain lsr rank=8 --shape 3072x768 --shape 768x3072 --layers 12"
SHAPE = re.compile(r"([1-9]\d*)[x×]([1-9]\d*)")
LORA_RANK = 8


def command(
    method: Annotated[str, typer.Argument(help="A method; finespun methods lists them.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(help="Options of the method, as option=value.", metavar="[OPTION=VALUE]..."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Outputs x inputs of a layer; can be repeated.", metavar="OUTxIN"),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="How many layers of each shape.")] = 24,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step, for operations.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Explain a method: formula, what it is good for, trained parameters and operations."""
    shapes = [read_shape(text) for text in shape or ["768x768"]]
    found = facts(choose(method, options or []), shapes, layers, tokens)
    if as_json:
        echo(json.dumps(found, ensure_ascii=False))
        return
    echo(f"{method}  {found['link']}", bold=True)
    echo(f"\n{found['about']}\n")
    echo("  ".join(f"{name}={json.dumps(v)}" for name, v in found["options"].items()))
    echo()
    for line in table(found):
        echo(line)


def choose(method: str, options: Sequence[str]) -> "Structure":
    """The structure with its options set. Raises InputError naming a wrong one."""
    from pydantic import ValidationError

    from finespun.contract import Structure
    from finespun.recipes.axes import ValueOf
    from finespun.recipes.yaml import Section, apply_override, explain

    class Choice(Section):
        """What was typed, as the part of a recipe that it would be."""

        structure: Annotated[Structure, ValueOf("structure", alone=True)]

    values: dict[str, Any] = {"kind": method}
    for option in options:
        apply_override(values, option)
    try:
        return Choice.model_validate({"structure": values}).structure
    except ValidationError as error:
        raise InputError(explain(error, Choice, {}, method)) from error


def read_shape(text: str) -> tuple[int, int]:
    """(outputs, inputs) from "768x3072". Raises InputError."""
    found = SHAPE.fullmatch(text.strip())
    if found is None:
        raise InputError(f"--shape {text!r} is not OUTxIN; try 768x768")
    return int(found[1]), int(found[2])


def facts(
    one: "Structure", shapes: Sequence[tuple[int, int]], layers: int, tokens: int
) -> dict[str, Any]:
    """What a structure says of itself and of `layers` layers of each shape; no weight is held.

    `flops` are added to the forward passes over `tokens` rows, `base_flops` the layers' own.
    """
    from finespun.contract import Unmeasured
    from finespun.methods.structures import LoRA

    groups = [sites(i, shape, layers, one.site_kind) for i, shape in enumerate(shapes)]
    every = [site for group in groups for site in group]
    plan = one.plan(every, Unmeasured())
    total = one.total_parameters(plan)
    as_lora = sum(LoRA(rank=LORA_RANK).num_parameters(site) for site in plan.sites)
    return {
        "method": one.kind,
        **told(one),
        "starts_at_zero": one.starts_at_zero,
        "tokens": tokens,
        "shapes": [
            {
                "out": shape[0],
                "in": shape[1],
                "layers": layers,
                "num_parameters": sum(
                    one.num_parameters(s.shape, plan.choices[s.shape.name]) for s in group
                ),
                "flops": layers * one.flops(group[0].shape, tokens),
                "base_flops": layers * 2 * tokens * shape[0] * shape[1],
            }
            for shape, group in zip(shapes, groups, strict=True)
        ],
        "num_shared_parameters": one.num_shared_parameters(plan),
        "num_parameters": total,
        "lora_parameters": as_lora,
        "share_of_lora": total / as_lora,
    }


def sites(group: int, shape: tuple[int, int], layers: int, kind: str) -> "list[Site]":
    """Layers of one shape, whose weights are on the meta device: shapes without parameters."""
    import torch

    from finespun.contract import TensorSite

    weight = torch.empty(shape, device="meta")
    return [TensorSite(f"shape.{group}.layer.{i}", weight, kind=kind) for i in range(layers)]


def told(one: "Structure") -> dict[str, Any]:
    """What the docstring of a structure says, its parts apart."""
    import inspect

    about = inspect.getdoc(type(one)) or ""
    good = re.search(r"^Good for: (.+)$", about, re.MULTILINE)
    bad = re.search(r"^Not for: (.+)$", about, re.MULTILINE)
    return {
        "formula": about.partition("\n\n")[0],
        "about": about,
        "good_for": good and good[1],
        "not_for": bad and bad[1],
        "source": one.source,
        "link": link(one.source),
        "options": one.options(),
    }


def link(source: str) -> str:
    """The address of a source; a source that is no arXiv id stays as it is.

    >>> link("arXiv 2502.13568")
    'https://arxiv.org/abs/2502.13568'
    """
    found = re.match(r"arXiv (\d{4}\.\d{4,5})", source)
    return f"https://arxiv.org/abs/{found[1]}" if found else source


def table(found: dict[str, Any]) -> list[str]:
    """Lines of parameters and operations."""
    lines = []
    for row in found["shapes"]:
        share = row["flops"] / row["base_flops"]
        lines.append(
            f"{row['layers']} layers of {row['out']} x {row['in']}: "
            f"{row['num_parameters']:,} parameters, {row['flops']:,} operations "
            f"for {found['tokens']:,} tokens ({share:.1%} of the layers' own)"
        )
    if found["num_shared_parameters"]:
        lines.append(f"shared by all: {found['num_shared_parameters']:,} parameters")
    lines.append(
        f"in all: {found['num_parameters']:,} parameters, {found['share_of_lora']:.1%} of "
        f"{found['lora_parameters']:,} (LoRA of rank {LORA_RANK})"
    )
    return lines
