"""Making an adapter small again after ranks, terms or gates were switched off."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from finespun.contract.delta import Delta
from finespun.contract.mixing import CHOICE, carry
from finespun.contract.structure import TIE, Plan, Structure
from finespun.linalg import LowRank
from finespun.methods.structures.lora import LoRA, lora_of

Compacted = tuple[Structure, Plan, dict[str, Delta]]


def compact(structure: Structure, plan: Plan, deltas: Mapping[str, Delta]) -> Compacted:
    """The same updates without dead parameters and gates: in the structure's own form where every
    site has one, else as LoRAs of each site's own rank, dead ranks removed. Sites whose update is
    dead, or whose own form has no parameter left, go, unless another bypass begins or ends there.
    Nothing changes where nothing was switched off or gated."""
    if not any(d.dead or d.masks() or d.gating is not None for d in deltas.values()):
        return structure, plan, dict(deltas)
    ends = {end for choice in plan.choices.values() for end in choice.get("span") or ()}
    ends |= {*plan.shared.get(TIE, {}).values()}
    deltas = {name: delta for name, delta in deltas.items() if name in ends or not delta.dead}
    own = {name: _own_form(delta) for name, delta in deltas.items()}
    if all(found is not None for found in own.values()):
        small = {
            name: (found[0], {**plan.choices[name], **found[1]})
            for name, found in own.items()
            if found is not None and (name in ends or not _emptied(deltas[name], found[0]))
        }
    else:
        small = {name: lora_of(delta.site, _alive(delta)) for name, delta in deltas.items()}
        ranks = [choice["rank"] for _, choice in small.values()]
        structure = LoRA(rank=max(ranks), dropout=structure.dropout, seed=structure.seed)
    for name, (delta, _) in small.items():
        carry(deltas[name], delta)
    kept = {name: {k: v for k, v in plan.choices[name].items() if k == CHOICE} for name in small}
    choices = {name: {**choice, **kept[name]} for name, (_, choice) in small.items()}
    shared = {} if structure.kind == "lora" else plan.shared
    sites = tuple(site for site in plan.sites if site.name in small)
    plan = dataclasses.replace(plan, sites=sites, choices=choices, shared=shared)
    return structure, plan, {name: delta for name, (delta, _) in small.items()}


def _own_form(delta: Delta) -> tuple[Delta, dict[str, Any]] | None:
    """A delta in which nothing was switched off stays the object it is."""
    touched = delta.masks() or delta.gating is not None
    found = delta.compact() if touched or delta.dead else (delta, {})
    return (delta, {}) if found is None and not touched else found


def _emptied(before: Delta, after: Delta) -> bool:
    """Whether the update had parameters of its own and has none left."""
    had, has = (any(p.numel() for p in delta.trained_parameters()) for delta in (before, after))
    return had and not has


def _alive(delta: Delta) -> LowRank:
    exact = delta.as_low_rank()
    alive = (exact.A.abs().amax(1) > 0) & (exact.B.abs().amax(0) > 0)
    alive[0] |= not alive.any()
    return LowRank(exact.A[alive], exact.B[:, alive])
