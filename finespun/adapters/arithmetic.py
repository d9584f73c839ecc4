"""Arithmetic on adapters without a model: on their updates ΔW, or on their parameters θ.

    Updates(a) + Updates(b)                       ΔW_a + ΔW_b, whatever the two structures
    0.5 * Parameters(a) + 0.5 * Parameters(b)     (θ_a + θ_b) / 2, of equal forms only

Both are weighted sums of states, worked out by `state(name)` one site or tensor at a time, in
float64. Equal terms are put together before: a + b − b is a.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor

from finespun.adapters.deltas import BareSite, Deltas, Sites, update_of
from finespun.adapters.keys import Key, of_module, of_site
from finespun.adapters.state import AdapterState
from finespun.contract import Plan, SiteShape
from finespun.contract.structure import TIE
from finespun.errors import InputError
from finespun.linalg import LowRank
from finespun.methods.structures.lora import LoRA, lora_of

T = TypeVar("T")


class _Weighted(Generic[T]):
    """Σ w_i x_i over different x; one that cancels is gone."""

    terms: tuple[tuple[T, float], ...]

    def _of(self, terms: Sequence[tuple[T, float]]) -> Self:
        found: dict[object, tuple[T, float]] = {}
        for thing, weight in terms:
            if not math.isfinite(weight):
                raise InputError(f"weight {weight} must be a finite number; try 1.0")
            same = self._same(thing)
            found[same] = thing, weight + found.get(same, (thing, 0.0))[1]
        made = type(self).__new__(type(self))
        made.terms = tuple(t for t in found.values() if t[1]) or tuple(found.values())
        return made

    def _same(self, thing: T) -> object:
        """What equal terms have in common."""
        return id(thing)

    def __add__(self, other: Self) -> Self:
        return self._of((*self.terms, *other.terms))

    def __mul__(self, factor: float) -> Self:
        return self._of([(thing, weight * factor) for thing, weight in self.terms])

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self * -1.0

    def __sub__(self, other: Self) -> Self:
        return self + -other


@dataclasses.dataclass(frozen=True, eq=False)
class _Source:
    """Updates by site, in float64, worked out when asked for. `tied` and `trained` are what a
    result has to carry, `state` that of which nothing was changed."""

    shapes: Mapping[str, SiteShape]
    at: Callable[[str], LowRank]
    tied: Mapping[str, str]
    trained: tuple[str, ...]
    state: AdapterState | None = None


class Updates(_Weighted[_Source]):
    """The updates ΔW of a state, strength included, site by site; a site that a term lacks is zero
    there.

    `sites` gives the sites of the base where the structure reads its weights. Raises InputError for
    an update that is more than a ΔW (a moved bias, a bypass), FileError for damaged tensors.
    """

    def __init__(self, state: AdapterState, sites: Sites = BareSite) -> None:
        deltas = Deltas(state, sites)

        def at(name: str) -> LowRank:
            return _double(update_of(deltas[name], state.strength))

        tied = state.plan.shared.get(TIE, {})
        self.terms = ((_Source(deltas.sites, at, tied, state.trained, state), 1.0),)

    def _same(self, thing: _Source) -> object:
        return id(thing if thing.state is None else thing.state)

    @property
    def shapes(self) -> dict[str, SiteShape]:
        """Every site that a term has. Raises InputError where two have it in different shapes."""
        found: dict[str, SiteShape] = {}
        for source, _ in self.terms:
            for name, shape in source.shapes.items():
                if found.setdefault(name, shape) != shape:
                    raise InputError(f"{name!r} differs in shape: {found[name]} and {shape}")
        return found

    def __getitem__(self, name: str) -> LowRank:
        """ΔW of one site, in float64: of no more ranks than its shape can have."""
        shape = self.shapes[name]
        found = LowRank(
            torch.zeros(0, shape.in_features, dtype=torch.float64),
            torch.zeros(shape.out_features, 0, dtype=torch.float64),
        )
        for source, weight in self.terms:
            if weight and name in source.shapes:
                found = found + source.at(name) * weight
        most = min(shape.out_features, shape.in_features)
        return found.squeeze(most) if found.rank > most else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def squeeze(self, rank: int | None = None, energy: float | None = None) -> "Updates":
        """The nearest updates of this rank at every site, or of the smallest that keeps this share
        of ‖ΔW‖²; a site of fewer ranks stays."""

        def small(name: str) -> LowRank:
            found = self[name]
            if not found.rank:
                return found
            return found.squeeze(None if rank is None else min(rank, found.rank), energy)

        return self._derived(small)

    def errors(self, rank: int) -> dict[str, float]:
        """‖ΔW' − ΔW‖ / ‖ΔW‖ at every site after `squeeze(rank)`, from singular values alone."""
        return {name: self[name].error(rank) for name in self}

    def project(self, onto: "Updates") -> "Updates":
        """P_out ΔW P_in with the projections onto the column and row space of another's updates:
        the nearest whose spaces lie in the other's. Where the other has no update, zero; what is
        left, `a - a.project(b)`, is orthogonal to it."""

        def part(name: str) -> LowRank:
            own = self[name]
            other = onto[name] if name in onto.shapes else own * 0.0
            svd = other.svd()
            rank = int((1e-12 * svd.S.max() < svd.S).sum()) if svd.S.numel() else 0
            U, Vh = svd.U[:, :rank], svd.Vh[:rank]
            return LowRank((own.A @ Vh.mT) @ Vh, U @ (U.mT @ own.B))

        return self._derived(part)

    def _derived(self, at: Callable[[str], LowRank]) -> "Updates":
        return self._of([(_Source(self.shapes, at, self._tied(), self._trained()), 1.0)])

    def _tied(self) -> Mapping[str, str]:
        every = [source.tied for source, _ in self.terms]
        if any(tied != every[0] for tied in every):
            raise InputError("one update acts at two uses of a tied weight, the other at one")
        return every[0]

    def _trained(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for source, _ in self.terms for n in source.trained))

    def state(
        self, name: str, modules: "AdapterState | Literal['none'] | None" = None
    ) -> AdapterState:
        """The sum as a LoRA of each site's own rank, in float32. `modules` is the state whose
        copies of modules it takes over; copies are not added up, so that it must be given, or
        "none", where a term has some. Raises InputError."""
        if modules is None and (trained := self._trained()):
            raise InputError(
                f"copies of modules ({', '.join(trained)}) are not added up: modules=STATE takes "
                "over those of one state, modules='none' leaves them out"
            )
        tensors, choices = dict[Key, Tensor](), dict[str, dict[str, Any]]()
        for site, shape in self.shapes.items():
            exact = self[site]
            if not exact.rank:
                exact = LowRank(exact.A.new_zeros(1, shape.in_features),
                                exact.B.new_zeros(shape.out_features, 1))  # fmt: skip
            delta, choices[site] = lora_of(BareSite(shape), exact)
            tensors |= of_site(site, {k: t.detach() for k, t in delta.state_dict().items()})
        held = modules if isinstance(modules, AdapterState) else None
        for module in () if held is None else held.trained:
            tensors |= of_module(module, held.module(module))  # type: ignore[union-attr]
        rank = max(choice["rank"] for choice in choices.values())
        tied = self._tied()
        plan = Plan(tuple(self.shapes.values()), choices, {TIE: tied} if tied else {})
        made = LoRA(rank=rank, alpha=rank)
        trained = () if held is None else held.trained
        base = self.terms[0][0].state.base if self.terms[0][0].state is not None else None
        return AdapterState.pack(name, made, plan, tensors, trained, base=base)


class Parameters(_Weighted[AdapterState]):
    """The parameters of a state, those of its bank and its copies of modules included.

    Sums are of equal forms only: one structure with one seed, one plan, one strength, and equal
    starts, gates, masks and whole numbers, none of which can be added up. Raises InputError.
    """

    def __init__(self, state: AdapterState) -> None:
        self.terms = ((state, 1.0),)

    @classmethod
    def average(
        cls, states: Sequence[AdapterState], weights: Sequence[float] | None = None
    ) -> "Parameters":
        """Σ w_i θ_i / Σ w_i, all of one weight unless given."""
        shares = [1.0] * len(states) if weights is None else list(weights)
        total = math.fsum(shares)
        if not states or len(shares) != len(states) or not total:
            raise InputError(
                f"{len(states)} states need as many weights whose sum is not zero, not {shares}"
            )
        return cls(states[0])._of([(s, w / total) for s, w in zip(states, shares)])

    def state(self, name: str) -> AdapterState:
        """The sum as a state of the first one's form."""
        first, *others = (state for state, _ in self.terms)
        for other in others:
            _check_equal(first, other)
        tensors = {key: self._sum(key, tensor) for key, tensor in first.tensors.items()}
        return dataclasses.replace(first.with_tensors(tensors), name=name, lineage=None)

    def _sum(self, key: Key, like: Tensor) -> Tensor:
        if not _added(key, like):
            return like
        total = torch.zeros(like.shape, dtype=torch.float64)
        for state, weight in self.terms:
            if weight:
                total += state.tensors[key].double() * weight
        return total.to(like.dtype)


def _added(key: Key, tensor: Tensor) -> bool:
    return key.role in ("parameter", "buffer") and tensor.is_floating_point()


def _check_equal(one: AdapterState, other: AdapterState) -> None:
    """Raise InputError unless the parameters of two states may be added up."""
    both = f"{one.name!r} and {other.name!r}"
    made = [dataclasses.replace(s.structure, dropout=0.0) for s in (one, other)]
    if made[0] != made[1] or not one.form.fits(other.form):
        raise InputError(
            f"{both} differ in form ({one.structure} on {len(one.plan.sites)} sites, "
            f"{other.structure} on {len(other.plan.sites)}): add their updates instead"
        )
    if one.strength != other.strength:
        raise InputError(f"{both} have the strengths {one.strength} and {other.strength}")
    for key, tensor in one.tensors.items():
        if not _added(key, tensor) and not torch.equal(tensor, other.tensors[key]):
            raise InputError(
                f"{key!r} of {both} differs, and cannot be added up: add their updates instead"
            )


def _double(update: LowRank) -> LowRank:
    return LowRank(update.A.double(), update.B.double())
