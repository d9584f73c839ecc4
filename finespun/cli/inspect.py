"""`finespun inspect`: what an adapter folder holds, without loading its base."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from finespun.files import Saved

EXAMPLE = "finespun inspect out/trec-lsr-small"


def command(
    adapter: Annotated[str, typer.Argument(help="A folder that Finespun or PEFT wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print an adapter's structure, layers, numbers, base and origin; no model is loaded."""
    from finespun.files import read_adapter

    found = facts(read_adapter(adapter))
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    width = max(map(len, found))
    for name, value in found.items():
        lines = value if isinstance(value, list) else [value]
        for number, line in enumerate(lines):
            shown = f"{line:,}" if isinstance(line, int) else line
            typer.echo(f"{'' if number else name:<{width}}  {shown}")


def facts(saved: "Saved") -> dict[str, Any]:
    """Name -> value of all that a person may want to know."""
    entry, plan = saved.entry, saved.entry.plan
    held = {} if entry.flat is None else entry.flat.tensors()
    modules = sum(t.numel() for key, t in held.items() if key.startswith("trained/"))
    found = {
        "name": entry.name,
        "structure": str(entry.structure),
        "update numbers": entry.structure.total(plan),
        "module numbers": modules,
        "strength": str(entry.scale),
        "layers": [f"{s.name} ({s.out_features} x {s.in_features})" for s in plan.sites],
        "trained modules": list(entry.trained),
        "base": "not known" if saved.base is None else str(saved.base),
        "sha256": saved.sha256,
    }
    if saved.lineage is not None:
        made = saved.lineage
        found["made"] = ", ".join(filter(None, [made.method, made.created]))
        found["metrics"] = [f"{name}: {value}" for name, value in made.metrics.items()]
        found["versions"] = [f"{name} {version}" for name, version in made.versions.items()]
    found["notes"] = list(saved.notes)
    return {name: value for name, value in found.items() if value not in ([], "")}
