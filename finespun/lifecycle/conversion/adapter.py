"""Any adapter in another structure's form; what is lost is measured, layer by layer.

Sources: LoRA-Squeeze, arXiv 2602.10993; LSR-Adapt, arXiv 2502.13568.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from finespun import files
from finespun.adapters.deltas import update_of
from finespun.adapters.keys import of_module
from finespun.adapters.state import AdapterState
from finespun.contract import Plan, Structure
from finespun.contract.structure import TIE, Ranked
from finespun.errors import InputError, nearest
from finespun.files import Lineage, Parent, Saved, lineage_of
from finespun.lifecycle.conversion import diffusion
from finespun.lifecycle.conversion.fitted import Fitted, as_factors, as_structure
from finespun.lifecycle.stored import StoredWeights, deltas_of, source_name
from finespun.methods.axes import make

Format = Literal["native", "peft", "diffusers", "kohya"]
CONVERTED_FORMATS = get_args(Format)
SHOWN = 5


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote. At each site: `errors`, ‖ΔW' − ΔW‖ / ‖ΔW‖ of what was written;
    `predicted`, the same from singular values before anything is fitted, where they say it;
    `ranks`, of those that have factors. `before` and `after` are the parameters of all updates."""

    folder: Path
    structure: Structure
    errors: Mapping[str, float]
    predicted: Mapping[str, float]
    ranks: Mapping[str, int]
    before: int
    after: int

    @property
    def error(self) -> float:
        """The largest of `errors`."""
        return max(self.errors.values())

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        span = f" of rank{'s' if ranks[1:] else ''} {ranks[0]}" if ranks else ""
        span += f" to {ranks[-1]}" if ranks[1:] else ""
        worst = max(self.errors, key=lambda name: self.errors[name])
        told = "exact to rounding" if self.error < 1e-6 else f"{self.error:.4f} at {worst!r}"
        return (
            f"{self.folder}: {self.structure.kind}{span} at {len(self.errors)} layers, "
            f"{self.before:,} -> {self.after:,} parameters\n"
            f"largest relative error: {told}"
        )


@torch.no_grad()
def convert(
    src: str | Path,
    dst: str | Path,
    structure: Structure | str,
    refine: int = 0,
    max_error: float | None = None,
    energy: float | None = None,
    model: str | Path | None = None,
    format: Format = "native",
    part: str | None = None,
    overwrite: bool = True,
    allow_full: bool = True,
) -> Converted:
    """Write the adapter in `src` (any that `load` reads) to `dst` in another structure's form.

    To a LoRA: the best approximation of its rank, ΔW' = Σ_{i≤r} σ_i u_i v_iᵀ; `energy` takes at
    each site the smallest rank that keeps this share of ‖ΔW‖². The word "lora" takes every factor
    there is: exact. To an LSR: the balanced factors of ΔW, each replaced by its nearest Kronecker
    sum, then `refine` steps of L-BFGS on ‖ΔW' − ΔW‖. To any other: least squares over its
    parameters (`Delta.assign`), as near as its form comes.

    Trained modules (a head) go along, unless `allow_full` is False; strength is folded in; the
    source is recorded as the parent. `format` "peft", "diffusers" or "kohya" writes a LoRA in that
    format, of one rank, instead of ours; for the last `dst` is a file. `part` says which part of a
    pipeline ("unet", ...) to take from a file, or to write. An older adapter of that format in
    `dst` is replaced, as by torch.save; `overwrite=False` keeps it; a run, a model or another
    format's adapter stays always.

    No model is loaded and one ΔW is held at a time; where ΔW depends on the base weight (DoRA,
    HiRA, ...), in `src` or in `dst`, `model` names its folder and single tensors are read from it,
    as are the sizes that files of PEFT's methods other than LoRA do not say, kohya's names, and the
    sizes of kernels.
    Raises InputError where an error exceeds `max_error` or older work stays in the way, FileError
    for files that are damaged or cannot be written; `dst` is untouched then.
    """
    if refine < 0 or (max_error is not None and not 0 <= max_error < 1):
        raise InputError(f"refine={refine} must be at least 0, max_error={max_error} in [0, 1)")
    form, rank, scale = _form(structure, energy, format)
    files.check_source(src, dst)
    files.refuse_to_lose(dst, format, overwrite)
    base = None if model is None else StoredWeights(model)
    saved = files.read_adapter(src, layers=None if base is None else base.sites)
    if not saved.state.plan.sites:
        raise InputError(f"{str(src)!r} changes no weight: there is nothing to convert")
    saved, part = diffusion.named(saved, base, format, part)
    deltas = deltas_of(saved.state, base)
    whole = as_factors(deltas, form, rank, energy, scale) if form.holds_any else None
    fitted = whole or as_structure(deltas, form, refine)
    _refuse_above(max_error, fitted, form)
    made = _named(form, fitted) if isinstance(structure, str) else form
    state = _state(saved, made, fitted, refine, allow_full)
    path, worst = Path(dst), max(fitted.errors.values())
    if format == "native":
        files.write(state, dst)
    elif format == "peft":
        _write_peft(state, fitted, Path(src), dst)
    else:
        path = diffusion.write(saved, state, worst, src, dst, format, part, base)
    told = fitted.errors, fitted.predicted, fitted.ranks
    return Converted(path, made, *told, saved.state.num_parameters, state.num_parameters)


def _form(
    structure: Structure | str, energy: float | None, format: Format
) -> tuple[Structure, int | None, float]:
    """The structure asked for, the most ranks that it may take (None: as many as there are), and
    the scale before its factors."""
    word = isinstance(structure, str)
    form = make(structure) if isinstance(structure, str) else structure
    if format not in CONVERTED_FORMATS:
        raise InputError(f"format={format!r} is not known; {nearest(format, CONVERTED_FORMATS)}")
    if not form.holds_any:
        if energy is not None:
            raise InputError(
                f"energy chooses ranks of a LoRA; of a {form.kind} the size is the one you give"
            )
        if format != "native":
            told = "PEFT's" if format == "peft" else f"{format}'s"
            raise InputError(
                f"{told} format is written here from a LoRA, not a {form.kind}: convert to 'lora'"
            )
    if word or not isinstance(form, Ranked):
        return form, None, 1.0
    return form, form.rank, form.scale


def _named(form: Structure, fitted: Fitted) -> Structure:
    """The structure of what was written, where a word alone asked for it."""
    if not form.holds_any:
        return form
    most = max(fitted.ranks.values())
    return form.from_options(rank=most, alpha=float(most))


def _refuse_above(max_error: float | None, fitted: Fitted, form: Structure) -> None:
    if max_error is None:
        return
    over = {n: e for n, e in fitted.errors.items() if e > max_error}
    if not over:
        return
    worst = sorted(over, key=lambda name: -over[name])[:SHOWN]
    told = {n: f" (predicted {p:.3f})" for n, p in fitted.predicted.items()}
    shown = ", ".join(f"{n!r} {over[n]:.3f}{told.get(n, '')}" for n in worst)
    way = f"a larger {' or '.join(form.sizes)}" if form.sizes else "another structure"
    raise InputError(
        f"{len(over)} of {len(fitted.errors)} layers are off by more than max_error={max_error}: "
        f"{shown}; try {way}. Nothing was written"
    )


def _state(
    saved: Saved, made: Structure, fitted: Fitted, refine: int, allow_full: bool
) -> AdapterState:
    old, line = saved.state, _lineage(saved, made, fitted, refine)
    tensors, trained = dict(fitted.tensors), old.trained if allow_full else ()
    for module in trained:
        tensors |= of_module(module, old.module(module))
    tied = {k: v for k, v in old.plan.shared.items() if k == TIE}
    made = dataclasses.replace(made, dropout=old.structure.dropout)
    plan = Plan(old.plan.sites, fitted.choices, {**fitted.shared, **tied})
    return AdapterState.pack(old.name, made, plan, tensors, trained, lineage=line, base=old.base)


def _lineage(saved: Saved, made: Structure, fitted: Fitted, refine: int) -> Lineage:
    told = {"conversion_error": max(fitted.errors.values()), "refine": refine}
    old, parent = saved.state.lineage, Parent(saved.state.name, saved.sha256)
    if old is None:
        return lineage_of(made, metrics=told, parents=(parent,))
    return lineage_of(made, old.recipe, told, old.seeds, (parent,), old.task)


def _write_peft(state: AdapterState, fitted: Fitted, src: Path, dst: str | Path) -> None:
    updates = {name: update_of(delta) for name, delta in deltas_of(state).items()}
    bad = [s.name for s in state.plan.sites if s.kind != "linear" or ":" in s.name]
    if bad or TIE in state.plan.shared:
        raise InputError(
            f"{(bad or ['a tied weight'])[0]!r}: PEFT's format is written here for whole linear "
            "layers only; load the adapter on its model and export it from there"
        )
    name, task = source_name(src)
    trained = {f"{m}.{k}": v for m in state.trained for k, v in state.module(m).items()}
    source = name or (state.base.source if state.base else "")
    ranks = dict.fromkeys(updates, max(update.rank for update in updates.values()))
    config = files.lora_config(ranks, sorted(updates), state.trained, source, task)
    line = state.lineage or lineage_of(state.structure)
    error = max(fitted.errors.values())
    files.write_lora(dst, state.name, updates, config, trained, state.base, line, error)
