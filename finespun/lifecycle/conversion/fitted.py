"""The updates of an adapter in another structure's form, site by site, and what that loses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finespun.adapters.deltas import Deltas, update_of
from finespun.adapters.keys import Key, of_bank, of_site
from finespun.contract import Delta, Structure
from finespun.contract.fitting import distance, fit_all
from finespun.contract.need import MEASURED
from finespun.errors import InputError, nearest
from finespun.linalg import LowRank
from finespun.methods.axes import AXES
from finespun.methods.composition import instead


@dataclass
class Fitted:
    """What the sites came to: tensors and choices of the new adapter; by site, the error of what
    was written, the one expected in advance where it can be computed, and the rank of factors."""

    tensors: dict[Key, Tensor] = field(default_factory=dict)
    choices: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def keep(self, delta: Delta, choice: Mapping[str, Any], exact: LowRank) -> None:
        """Take over a site that has become as near to `exact` as it can."""
        name, pair = delta.site.shape.name, delta.factors()
        if pair is not None:
            self.ranks[name] = len(pair[0])
            self.errors[name] = distance(delta.as_low_rank(), exact)
        else:
            self.errors[name] = _dense_distance(delta, exact)
        self.choices[name] = choice
        self.tensors |= of_site(name, {k: t.detach() for k, t in delta.state_dict().items()})


def as_factors(
    deltas: Deltas, form: Structure, rank: int | None, energy: float | None, scale: float
) -> Fitted:
    """Every update by factors of its own rank, in a form that holds any: the best approximation of
    rank `rank`, or of the smallest that keeps the share `energy`; with neither, itself."""
    out = Fitted()
    for name, delta in deltas.items():
        if rank is None and energy is None and delta.factors() is None:
            raise InputError(
                f"the update of {name!r} ({deltas.state.structure.kind}) has no factors to take "
                "over: give a rank or a share of the energy, such as rank=16 or energy=0.95 (on "
                "the command line --set rank=16 or --energy 0.95)"
            )
        exact = update_of(delta, deltas.state.strength)
        limit = exact.rank if rank is None else min(rank, exact.rank)
        small = exact if rank is None and energy is None else exact.squeeze(limit, energy)
        root = math.sqrt(scale)
        made = form.exactly(
            delta.site, LowRank(small.A.float() / root, small.B.float() / root), scale
        )
        if made is None:
            raise InputError(f"a {form.kind} does not hold an update of any rank")
        out.keep(*made, exact)
        out.predicted[name] = exact.error(small.rank)
    return out


def as_structure(deltas: Deltas, form: Structure, refine: int) -> Fitted:
    """Every update by the nearest that `form` can say; of sites that share trained parameters, by
    the nearest of all together.

    Raises InputError for a form that is no update of a weight, or that is chosen by what only a
    model at work shows.
    """
    if form.site_kind != "linear":
        raise InputError(
            f"a {form.kind} goes around blocks: it is no update of a weight; "
            f"{nearest(form.kind, able())}"
        )
    for need in sorted(form.needs & MEASURED):
        other = instead(form, need) or f"; {nearest(form.kind, able())}"
        raise InputError(
            f"a {form.kind} that chooses by {need} of a model on data cannot be made from files"
            f"{other}"
        )
    sites = [deltas.site_of(shape) for shape in deltas.sites.values()]
    plan = form.plan(sites)
    bank = form.bank(plan)
    out = Fitted(shared=plan.shared)
    joint = bank is not None and any(p.requires_grad for p in bank.parameters())
    held: list[tuple[Delta, LowRank]] = []
    for name, delta in deltas.items():
        exact = update_of(delta, deltas.state.strength)
        made = form.build(delta.site, plan, bank)
        if (expected := made.predicted(exact)) is not None:
            out.predicted[name] = expected
        if joint:
            held.append((made, exact))
            continue
        with torch.enable_grad():
            made.assign(exact, refine=refine)
        out.keep(made, plan.choices[name], exact)
    if held:
        _together(out, held, plan.choices)
    if bank is not None:
        out.tensors |= of_bank({k: t.detach() for k, t in bank.state_dict().items()})
    return out


def able() -> list[str]:
    """Kinds of structures that take over an update by their defaults."""
    known = sorted(AXES["structure"].known.items())
    return [k for k, cls in known if cls.site_kind == "linear" and not cls().needs & MEASURED]


def _together(
    out: Fitted, held: Sequence[tuple[Delta, LowRank]], choices: Mapping[str, Mapping[str, Any]]
) -> None:
    with torch.enable_grad():
        fit_all([delta for delta, _ in held], [exact for _, exact in held])
    for delta, exact in held:
        out.keep(delta, choices[delta.site.shape.name], exact)


def _dense_distance(delta: Delta, exact: LowRank) -> float:
    """As `distance`, of an update that has no factors."""
    wanted = exact.dense().double()
    w0 = delta.base_weight() if delta.reads_base else delta.blank()
    size, off = float(wanted.norm()), float((delta.dense(w0).detach().double() - wanted).norm())
    return off / size if size else off
