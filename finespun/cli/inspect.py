"""`finespun inspect`: what an adapter folder holds, without loading its base."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finespun.cli.screen import echo

if TYPE_CHECKING:
    from torch import Tensor

    from finespun.files import FileSummary, Saved

EXAMPLE = "finespun inspect out/trec-lsr-small"


def command(
    adapter: Annotated[str, typer.Argument(help="A folder that Finespun or PEFT wrote.")],
    model: Annotated[
        str | None, typer.Option(help="The base, where updates depend on its weights or sizes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print an adapter's structure, parameters, base, origin and the spectrum of every layer's
    update; no model is loaded."""
    from finespun.cli.convert import base_folder
    from finespun.files import summarise

    told = summarise(adapter) if model is None else None
    if told is not None:
        found = facts_without_model(told)
    else:
        found = all_facts(adapter, None if model is None else base_folder(model), as_json)
    if as_json:
        echo(json.dumps(found, ensure_ascii=False))
        return
    width = max(map(len, found))
    for name, value in found.items():
        lines = value if isinstance(value, list) else [value]
        for number, line in enumerate(lines):
            shown = f"{line:,}" if isinstance(line, int) else printable(line)
            echo(f"{'' if number else name:<{width}}  {shown}")


def all_facts(adapter: str, model: str | None, as_json: bool) -> dict[str, Any]:
    """Name -> value of everything that the files give, with those of the base in folder `model`."""
    from finespun.files import read_adapter
    from finespun.lifecycle.stored import StoredWeights

    layers = None if model is None else StoredWeights(model).sites
    saved = read_adapter(adapter, strict=False, layers=layers)
    found = {**origin(Path(adapter), saved), **facts(saved)}
    return found | spectra_of(saved, model, as_json)


def facts_without_model(told: "FileSummary") -> dict[str, Any]:
    """Name -> value of what a PEFT folder shows that needs its model to be read."""

    def shapes(tensors: Mapping[str, "Tensor"]) -> list[str]:
        return [f"{n} {' x '.join(map(str, t.shape))}" for n, t in sorted(tensors.items())]

    read = "" if told.kind is None else f", read as {told.kind}"
    note = (
        "its layers' sizes are the model's: --model shows all, as do fs.load(model, folder) and "
        "finespun convert with --model"
    )
    found = {
        "format": f"PEFT's {told.method}{read}",
        "options": [f"{name}: {value}" for name, value in told.options.items()],
        "stored parameters": told.numbers,
        "module parameters": sum(told.modules.values()),
        "bytes": told.bytes,
        "layers": [f"{path}: {', '.join(shapes(own))}" for path, own in told.layers.items()],
        "shared": shapes(told.shared),
        "trained modules": list(told.modules),
        "base": told.base or "not known",
        "sha256": told.sha256,
        "notes": ["this method is not read" if told.kind is None else note],
    }
    return {name: value for name, value in found.items() if value not in ([], "")}


def origin(folder: Path, saved: "Saved") -> dict[str, Any]:
    """What kind of folder it is; of one that we exported, from what and how exactly."""
    from finespun.files import native
    from finespun.files.peft import read as peft
    from finespun.storage.atomic import settled
    from finespun.storage.safe_io import read_json

    place = settled(folder)
    if (place / native.CONFIG).is_file():
        return {"format": "Finespun's own"}
    if saved.state.lineage is None or not (place / peft.SIDE).is_file():
        return {}
    error = read_json(place / peft.SIDE).get("relative_error")
    exact = f"relative error up to {error:.2%}" if isinstance(error, float) and error else "exact"
    return {"format": f"PEFT's, exported from {saved.state.lineage.method}, {exact}"}


def printable(text: str) -> str:
    """Text of a stranger's file without the signs that steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def facts(saved: "Saved") -> dict[str, Any]:
    """Name -> value of all that a person may need."""
    state, plan = saved.state, saved.state.plan
    found = {
        "name": state.name,
        "structure": str(state.structure),
        "update parameters": state.num_parameters,
        "module parameters": state.num_module_parameters,
        "strength": str(state.strength),
        "layers": [f"{s.name} ({s.out_features} x {s.in_features})" for s in plan.sites],
        "trained modules": list(state.trained),
        "base": "not known" if state.base is None else str(state.base),
        "sha256": saved.sha256,
    }
    if saved.state.lineage is not None:
        made = saved.state.lineage
        found["made"] = ", ".join(filter(None, [made.method, made.created]))
        found["parents"] = [f"{p.name} (sha256 {p.sha256[:12]})" for p in made.parents]
        found["metrics"] = [f"{name}: {value}" for name, value in made.metrics.items()]
        found["versions"] = [f"{name} {version}" for name, version in made.versions.items()]
    found["notes"] = list(saved.notes)
    return {name: value for name, value in found.items() if value not in ([], "")}


def spectra_of(saved: "Saved", model: str | None, as_json: bool) -> dict[str, Any]:
    """The spectra as one line a layer, or as JSON values; the reason where there are none."""
    import dataclasses

    from finespun.errors import InputError
    from finespun.lifecycle.conversion.facts import spectra

    try:
        found = list(spectra(saved, model))
    except InputError as error:
        return {"spectra": [] if as_json else [f"none: {error}"]}
    if as_json:
        return {"spectra": [dataclasses.asdict(one) for one in found]}
    lines = []
    for one in found:
        top = " ".join(f"{value:.3g}" for value in one.top)
        health = "".join(f", {name} {value:.3g}" for name, value in one.health.items())
        lines.append(
            f"{one.name}: norm {one.norm:.3g}, rank {one.rank}, effective {one.effective_rank:.2f},"
            f" top {top}{health}"
        )
    return {"spectra": lines} if lines else {}
