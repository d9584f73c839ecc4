"""The formats of diffusion models among those that `convert` reads and writes."""

import dataclasses
from pathlib import Path
from typing import cast

from finespun.adapters.deltas import update_of
from finespun.adapters.lineage import lineage_of
from finespun.adapters.state import AdapterState
from finespun.contract import SiteShape
from finespun.contract.structure import TIE
from finespun.errors import InputError, an
from finespun.files import Saved
from finespun.files.diffusion.names import Style, Unplaced, place_on, stripped
from finespun.files.diffusion.write import Update, split_name, target, write_diffusion
from finespun.lifecycle.stored import StoredWeights, deltas_of
from finespun.storage.atomic import located

STYLES = ("diffusers", "kohya")


def named(
    saved: Saved, base: StoredWeights | None, format: str, part: str | None
) -> tuple[Saved, str | None]:
    """The adapter under names that `format` can hold, and the part of a pipeline that it is for,
    where the file says so. What stays in these formats keeps its names, and all its parts.

    Raises InputError where the base, or the part to take, has to be named.
    """
    if not isinstance(saved, Unplaced):
        return saved, part
    if base is None and not saved.state.structure.holds_any:
        raise InputError(
            f"of a {saved.state.structure.kind} the file does not distinguish linear layers from "
            "convolutions: name the base's folder (model=..., on the command line --model)"
        )
    kept = format == saved.style or (format == "kohya" and saved.style == "diffusers")
    if kept and base is None and part is None:
        return saved, None
    if part is None and len(saved.parts) > 1:
        raise InputError(f"the file names {', '.join(saved.parts)}; say which, as part=...")
    whose = part or saved.parts[0] or None
    if base is None:
        return stripped(saved, part), whose
    return place_on(saved, base.layers(), part), whose


def write(
    saved: Saved,
    state: AdapterState,
    error: float,
    src: str | Path,
    dst: str | Path,
    format: str,
    part: str | None,
    base: StoredWeights | None,
) -> Path:
    """Write the LoRA `state`, made of `saved` and off by `error` at most, as one file; returns its
    path."""
    style = cast(Style, format)
    path = target(dst, style)
    if located(path) == located(src):
        raise InputError(f"{str(path)!r} is the adapter itself; name another file")
    if state.trained or TIE in state.plan.shared:
        what = f"the trained {state.trained[0]!r}" if state.trained else "a tied weight"
        raise InputError(
            f"{what} has no place in the format of {format}"
            + ("; --no-allow-full (allow_full=False) leaves it out" if state.trained else "")
        )
    layers = {} if base is None else base.layers()
    updates = []
    for name, delta in deltas_of(state).items():
        site = delta.site.shape
        if isinstance(saved, Unplaced):
            own, where = saved.where[name]
            kernel = saved.kernels.get(name, ())
            if saved.style == "kohya":
                own, where = "", name
            elif style == "kohya" and not own:
                own, where = split_name(where, state.base, part, style)
        else:
            own, where = split_name(name, state.base, part, style)
            kernel = layers[name].kernel if name in layers else ()
        _check(site, kernel)
        factors = update_of(delta)
        updates.append(Update(own, where, factors, factors.rank, kernel))
    most = max(u.rank for u in updates)
    padded = [dataclasses.replace(u, rank=most) for u in updates]
    line = state.lineage or lineage_of(state.structure)
    write_diffusion(path, style, padded, state.name, state.base, line, error)
    return path


def _check(site: SiteShape, kernel: tuple[int, ...]) -> None:
    if site.kind not in ("linear", "conv") or ":" in site.name:
        what = "a slice of a layer" if ":" in site.name else an(site.kind)
        raise InputError(f"{site.name!r} is {what}, which has no place in this format")
    if site.kind == "conv" and not kernel:
        raise InputError(
            f"{site.name!r} is a convolution, whose kernel's size only the base gives: name its "
            "folder (model=..., on the command line --model)"
        )
