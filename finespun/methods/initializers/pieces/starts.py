"""Starts given by factors A0 (r, in) and B0 (out, r): written into any structure, and taken
away again where the model must begin as its base.

ΔW = s (B A − B0 A0), exactly zero at step 0, whatever a structure could not hold of A0 and B0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from finespun.contract import Delta, Initializer, Measured, Setup, Structure, TrainingHooks
from finespun.contract.delta import Factors
from finespun.contract.fitting import fit_all
from finespun.errors import InputError, TrainingError
from finespun.linalg import LowRank

SMALL_RANK = 8  # of the start of a structure that has no rank
TOLD = 1e-5  # relative errors below are rounding


@dataclass
class Place:
    """One site as a start sees it: `rank` directions are wanted, and multiplied by `scale`; `seen`
    is what `factors` leaves for `settle`."""

    name: str
    delta: Delta
    rank: int
    measured: Measured
    seed: int
    seen: Tensor | None = None

    @property
    def scale(self) -> float:
        """s, what B0 A0 is multiplied by."""
        return self.delta.scale

    def weight(self) -> Tensor:
        """W0 (out, in) in float32 at least, dequantised where it is quantised."""
        return self.check(self.delta.base_weight(), "weights")

    def gradient(self) -> Tensor:
        """∂L/∂W0 (out, in)."""
        return self.check(self.measured.gradient(self.name), "gradient")

    def covariance(self) -> Tensor:
        """E[x xᵀ] (in, in)."""
        return self.check(self.measured.covariance(self.name), "covariance")

    def check(self, found: Tensor, what: str) -> Tensor:
        """The tensor where the delta is, in float32 at least. Raises TrainingError for NaN."""
        if not bool(torch.isfinite(found).all()):
            raise TrainingError(f"the {what} at {self.name!r} is not finite: nothing to start from")
        dtype = torch.promote_types(found.dtype, torch.float32)
        return found.detach().to(self.delta.site.device, dtype)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator fixed by (seed, site, purpose)."""
        return Structure(seed=self.seed).generator(self.name, purpose)

    def halves(self, U: Tensor, S: Tensor, Vh: Tensor) -> Factors:
        """q ∘ Vᵀ and U ∘ q with q = √(S / s): s·B0 A0 is U S Vᵀ."""
        q = (S / self.scale).sqrt()
        return q[:, None] * Vh, U * q


@dataclass(frozen=True, kw_only=True)
class FactorStart(Initializer):
    """A start given by A0 and B0. `refine` steps bring a form that cannot hold them, as LSR's,
    nearer; forms that can are not touched. With `apart` A0 and B0 may be turned each by itself."""

    refine: int = 50

    apart: ClassVar[bool] = False

    @property
    def moves(self) -> bool:
        """Whether the model is meant to start elsewhere than at its base."""
        return False

    def __post_init__(self) -> None:
        if self.refine < 0:
            raise InputError(f"refine={self.refine} must not be negative; try {-self.refine}")

    def factors(self, place: Place) -> Factors | None:
        """A0 (r, in) and B0 (out, r) of a site; None leaves it as the structure starts it."""
        raise NotImplementedError(f"{type(self).__name__} must say where it starts")

    def settle(self, place: Place, pair: Factors, error: float) -> list[str]:
        """After a site took its factors: a last word of the start; returns notes."""
        return []

    def suits(self, structure: Structure) -> None:
        if structure.site_kind == "block":
            raise InputError(
                f"{self.kind} starts from a layer's weight, and {structure.kind} goes around whole "
                "blocks; leave initializer out, or take lora or lsr"
            )

    def hooks(self) -> "Starting":
        return FactorStarting(self)


class Starting(TrainingHooks):
    """Writes a start before the optimiser exists; what could not be done as asked is in `told`.
    After an error the parameters are what they were."""

    def __init__(self, kind: str) -> None:
        self.kind, self.told = kind, list[str]()

    def news(self, step: int) -> list[str]:
        return [] if step else self.told

    @torch.no_grad()
    def prepare(self, setup: Setup) -> None:
        view = setup.adapter
        if any(d.origin is not None for d in view.deltas.values()):
            raise InputError(f"{self.kind}: the adapter keeps an exact start already")
        places = [
            place(n, d, setup)
            for n, d in view.deltas.items()
            if any(True for _ in d.trained_parameters())
        ]
        held = [d for d in (*view.deltas.values(), view.bank) if d is not None]
        before = [{k: v.clone() for k, v in d.state_dict().items()} for d in held]
        try:
            self.start(places)
        except BaseException:
            for module, state in zip(held, before):
                module.load_state_dict(state)
            raise

    def start(self, places: list[Place]) -> None:
        """Write every site's start."""
        raise NotImplementedError(f"{type(self).__name__} must write a start")


class FactorStarting(Starting):
    """Writes a start that is given by factors."""

    def __init__(self, form: FactorStart) -> None:
        super().__init__(form.kind)
        self.form = form

    def start(self, places: list[Place]) -> None:
        """Every site's start, then, where the model must not move, the points they are kept at."""
        form, errors, begun = self.form, dict[str, float](), list[Place]()
        shared = list[tuple[Place, Factors]]()
        for one in places:
            pair = form.factors(one)
            if pair is None:
                self.told.append(f"{form.kind}: {one.name!r} has no gradient: it starts as usual")
                continue
            begun.append(one)
            if one.delta.bank is not None:
                shared.append((one, pair))
                continue
            error = one.delta.take_factors(*pair, apart=form.apart, refine=form.refine)
            own_sides = type(one.delta).take_factors is not Delta.take_factors
            if not (form.apart and own_sides):  # their product may be another, then
                errors[one.name] = error
            self.told += form.settle(one, pair, error)
            one.seen = None
        if shared:
            updates = [LowRank(A, B * p.scale) for p, (A, B) in shared]
            found = fit_all([p.delta for p, _ in shared], updates)
            errors |= {p.name: e for (p, _), e in zip(shared, found)}
        self.told += self.summary(errors)
        if form.moves:
            self.told.append(moved(form.kind, begun))
        else:
            for one in begun:
                if not still(one.delta):
                    one.delta.keep_start()

    def summary(self, errors: Mapping[str, float]) -> list[str]:
        """How far off the starts are, in words."""
        if max(errors.values(), default=0.0) < TOLD:
            return []
        worst = max(errors, key=lambda n: errors[n])
        middle = sorted(errors.values())[len(errors) // 2]
        return [
            f"{self.kind}: the form cannot hold the start: off by {middle:.3g} of it in the "
            f"median layer, {errors[worst]:.3g} at {worst!r}"
        ]


def place(name: str, delta: Delta, setup: Setup) -> Place:
    """A site with the rank of its factors, or of its structure."""
    pair, shape = delta.low_rank(), delta.site.shape
    rank = getattr(setup.adapter.structure, "rank", SMALL_RANK) if pair is None else len(pair[0])
    rank = min(rank, shape.out_features, shape.in_features)
    return Place(name, delta, rank, setup.measured, setup.seed)


def still(delta: Delta) -> bool:
    """Whether ΔW is exactly zero now."""
    pair = delta.low_rank()
    if pair is not None:
        return not bool(pair[0].any()) or not bool(pair[1].any())
    return not bool(delta.dense(delta.base_weight()).any())


def norm(A: Tensor, B: Tensor, scale: float) -> float:
    """‖s·B A‖, nothing of its size formed."""
    return abs(scale) * float(LowRank(A.double(), B.double()).norm())


def moved(kind: str, places: Sequence[Place]) -> str:
    """How far a start is from the base, in words."""
    shares = {
        p.name: float(p.delta.dense(w0).norm()) / max(float(w0.norm()), math.ulp(0.0))
        for p in places
        for w0 in [p.delta.base_weight()]
    }
    most = max(shares, key=lambda n: shares[n])
    return f"{kind} moves the start: ‖ΔW‖ is up to {shares[most]:.3g} of ‖W0‖, at {most!r}"


def large(one: Place, pair: Factors, most: float) -> list[str]:
    """A warning where a start exceeds a share of its weight."""
    share = norm(*pair, one.scale) / max(float(one.weight().norm()), math.ulp(0.0))
    if share <= most:
        return []
    return [f"{one.name!r}: the start is {share:.2g} times the weight; train it at a lower lr"]
