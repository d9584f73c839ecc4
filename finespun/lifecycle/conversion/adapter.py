"""Any adapter as a LoRA of fewer ranks, or as an LSR; what is lost is measured, layer by layer.

Sources: LoRA-Squeeze, arXiv 2602.10993; LSR-Adapt, arXiv 2502.13568.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from finespun import files
from finespun.adapters.deltas import blamed, update_of
from finespun.adapters.keys import Key, of_module, of_site
from finespun.adapters.state import AdapterState
from finespun.contract import Plan, Structure
from finespun.contract.structure import TIE
from finespun.errors import InputError, nearest
from finespun.files import Lineage, Parent, Saved, lineage_of
from finespun.lifecycle.conversion import diffusion
from finespun.lifecycle.stored import (
    StoredWeights,
    deltas_of,
    source_name,
)
from finespun.linalg import LowRank, predicted_error
from finespun.methods.structures import LSR, LoRA
from finespun.methods.structures.lora import lora_of
from finespun.methods.structures.lsr import LSRDelta

Format = Literal["native", "peft", "diffusers", "kohya"]
FORMATS = get_args(Format)
OFFERED = ("lora", "lsr")
SHOWN = 5


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote. At each site: `errors`, ‖ΔW' − ΔW‖ / ‖ΔW‖ of what was written;
    `predicted`, the same told by singular values before anything is fitted; `ranks`.
    `before` and `after` are the parameters of all updates."""

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
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        worst = max(self.errors, key=lambda name: self.errors[name])
        told = "exact to rounding" if self.error < 1e-6 else f"{self.error:.4f} at {worst!r}"
        return (
            f"{self.folder}: {self.structure.kind} of {span} at {len(self.errors)} layers, "
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
    """Write the adapter in `src` (any that `load` reads) to `dst` as a LoRA or an LSR.

    To a LoRA: the best approximation of its rank, ΔW' = Σ_{i≤r} σ_i u_i v_iᵀ; `energy` takes at
    each site the smallest rank that keeps this share of ‖ΔW‖². The word "lora" takes every factor
    there is: exact. To an LSR: the balanced factors of ΔW, each replaced by its nearest Kronecker
    sum, then `refine` steps of L-BFGS on ‖ΔW' − ΔW‖. Trained modules (a head) go along, unless
    `allow_full` is False; strength is folded in; the source is recorded as the parent. `format`
    "peft", "diffusers" or "kohya" writes a LoRA in that format, of one rank, instead of ours; for
    the last `dst` is a file. `part` says which part of a pipeline ("unet", ...) to take from a
    file, or to write. An older adapter of that format in `dst` is replaced, as by torch.save;
    `overwrite=False` keeps it; a run, a model or another format's adapter stays always.

    No model is loaded and one ΔW is held at a time; where ΔW depends on the base weight (DoRA,
    HiRA, ...), `model` names its folder and single tensors are read from it, as are the sizes that
    files of PEFT's methods other than LoRA do not tell, kohya's names, and the sizes of kernels.
    Raises InputError where an error exceeds `max_error` or older work stays in the way, FileError
    for files that are damaged or cannot be written; `dst` is untouched then.
    """
    target = _target(structure, energy, format)
    if refine < 0 or (max_error is not None and not 0 <= max_error < 1):
        raise InputError(f"refine={refine} must be at least 0, max_error={max_error} in [0, 1)")
    files.check_source(src, dst)
    files.refuse_to_lose(dst, format, overwrite)
    base = None if model is None else StoredWeights(model)
    saved = files.read_adapter(src, layers=None if base is None else base.sites)
    if not saved.state.plan.sites:
        raise InputError(f"{str(src)!r} changes no weight: there is nothing to convert")
    saved, part = diffusion.named(saved, base, format, part)
    fitted = _Fitted({}, {}, {}, {}, {})
    if isinstance(target, LSR):
        _as_lsr(saved, base, target, refine, fitted)
    else:
        _as_lora(saved, base, target, energy, fitted)
    _refuse_above(max_error, fitted, target)
    made = target or LoRA(rank=(most := max(fitted.ranks.values())), alpha=most)
    line = _lineage(saved, made, fitted, refine)
    state = _state(saved.state, made, fitted, line, allow_full)
    path, worst = Path(dst), max(fitted.errors.values())
    if format == "native":
        files.write(state, dst)
    elif format == "peft":
        _write_peft(state, fitted, Path(src), dst)
    else:
        path = diffusion.write(saved, state, worst, src, dst, format, part, base)
    sizes = saved.state.num_parameters, sum(t.numel() for t in fitted.tensors.values())
    return Converted(path, made, fitted.errors, fitted.predicted, fitted.ranks, *sizes)


@dataclass
class _Fitted:
    """What the sites came to."""

    tensors: dict[Key, Tensor]
    choices: dict[str, Mapping[str, Any]]
    errors: dict[str, float]
    predicted: dict[str, float]
    ranks: dict[str, int]


def _target(structure: Structure | str, energy: float | None, format: Format) -> Structure | None:
    """The structure asked for; None for a LoRA with as many ranks as it takes."""
    if isinstance(structure, str):
        if structure not in ("lora", "lsr"):
            raise InputError(f"cannot convert to {structure!r}; {nearest(structure, OFFERED)}")
        structure = LSR() if structure == "lsr" else LoRA()
        exact = isinstance(structure, LoRA)
    else:
        exact = False
    if not isinstance(structure, LoRA | LSR):
        raise InputError(
            f"cannot convert to {structure.kind!r}: only a LoRA or an LSR can be fitted to an "
            "update that another method made"
        )
    if format not in FORMATS:
        raise InputError(f"format={format!r} is not known; {nearest(format, FORMATS)}")
    if isinstance(structure, LSR):
        if energy is not None:
            raise InputError("energy chooses ranks of a LoRA; an LSR has the rank you give it")
        if format != "native":
            told = "PEFT's" if format == "peft" else f"{format}'s"
            raise InputError(f"{told} format holds no LSR; convert to 'lora', which is exact")
        if structure.rank_split is not None and len(structure.rank_split) == 3:
            raise InputError("three Kronecker factors have no best approximation; use two")
    return None if exact else structure


def _as_lora(
    saved: Saved,
    base: StoredWeights | None,
    target: Structure | None,
    energy: float | None,
    out: _Fitted,
) -> None:
    wanted = target.rank if isinstance(target, LoRA) else None
    scale = target.scale if isinstance(target, LoRA) else 1.0
    for name, delta in deltas_of(saved.state, base).items():
        with blamed(repr(name)):
            known = delta.factors() is not None
        if wanted is None and energy is None and not known:
            raise InputError(
                f"the update of {name!r} ({saved.state.structure.kind}) has no factors to take "
                "over: give a rank or a share of the energy, such as rank=16 or energy=0.95 (on "
                "the command line --set rank=16 or --energy 0.95)"
            )
        exact = update_of(delta, saved.state.strength)
        limit = exact.rank if wanted is None else min(wanted, exact.rank)
        small = exact if wanted is None and energy is None else exact.squeeze(limit, energy)
        out.predicted[name] = exact.error(small.rank)
        out.errors[name] = _distance(small, exact)
        root = math.sqrt(scale)
        fitted, choice = lora_of(
            delta.site, LowRank(small.A.float() / root, small.B.float() / root), scale
        )
        _keep(out, name, fitted.state_dict(), choice, small.rank)


def _as_lsr(
    saved: Saved, base: StoredWeights | None, target: LSR, refine: int, out: _Fitted
) -> None:
    for name, delta in deltas_of(saved.state, base).items():
        exact = update_of(delta, saved.state.strength)
        own = Plan((delta.site.shape,), {name: target.choose(delta.site)})
        fitted = target.build(delta.site, own)
        if not isinstance(fitted, LSRDelta):
            raise InputError(f"{target} builds no LSR")
        c = fitted.choice
        out.predicted[name] = predicted_error(exact, c["ranks"], c["down"], c["up"], c["terms"])
        with torch.enable_grad():
            fitted.project(exact, refine)
        out.errors[name] = _distance(fitted.as_low_rank(), exact)
        _keep(out, name, fitted.state_dict(), own.choices[name], target.rank)


def _keep(
    out: _Fitted,
    name: str,
    state: Mapping[str, Tensor],
    choice: Mapping[str, Any],
    rank: int,
) -> None:
    out.tensors |= of_site(name, state)
    out.choices[name], out.ranks[name] = choice, rank


def _distance(found: LowRank, exact: LowRank) -> float:
    """‖found − exact‖ / ‖exact‖; 0 where both are zero."""
    a, b = LowRank(found.A.double(), found.B.double()), LowRank(exact.A.double(), exact.B.double())
    size = float(b.norm())
    return float((a - b).norm()) / size if size else float(a.norm())


def _refuse_above(max_error: float | None, fitted: _Fitted, target: Structure | None) -> None:
    if max_error is None:
        return
    over = {n: e for n, e in fitted.errors.items() if e > max_error}
    if not over:
        return
    worst = sorted(over, key=lambda name: -over[name])[:SHOWN]
    shown = ", ".join(f"{n!r} {over[n]:.3f} (predicted {fitted.predicted[n]:.3f})" for n in worst)
    way = (
        "more separation_rank, a larger rank or refine" if isinstance(target, LSR) else "more rank"
    )
    raise InputError(
        f"{len(over)} of {len(fitted.errors)} layers are off by more than max_error={max_error}: "
        f"{shown}; try {way}. Nothing was written"
    )


def _state(
    old: AdapterState, made: Structure, fitted: _Fitted, line: Lineage, allow_full: bool
) -> AdapterState:
    tensors, trained = dict(fitted.tensors), old.trained if allow_full else ()
    for module in trained:
        tensors |= of_module(module, old.module(module))
    tied = {k: v for k, v in old.plan.shared.items() if k == TIE}
    made = dataclasses.replace(made, dropout=old.structure.dropout)
    plan = Plan(old.plan.sites, fitted.choices, tied)
    return AdapterState.pack(old.name, made, plan, tensors, trained, lineage=line, base=old.base)


def _lineage(saved: Saved, made: Structure, fitted: _Fitted, refine: int) -> Lineage:
    told = {"conversion_error": max(fitted.errors.values()), "refine": refine}
    old, parent = saved.state.lineage, Parent(saved.state.name, saved.sha256)
    if old is None:
        return lineage_of(made, metrics=told, parents=(parent,))
    return lineage_of(made, old.recipe, told, old.seeds, (parent,), old.task)


def _write_peft(state: AdapterState, fitted: _Fitted, src: Path, dst: str | Path) -> None:
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
