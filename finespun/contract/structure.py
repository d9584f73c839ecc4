"""A structure is a choice of how ΔW is written: hyper-parameters, a plan, and a Delta per site."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from finespun.contract.delta import Bank, Delta, Factors
from finespun.contract.method import REGISTRY, Method
from finespun.contract.method import register as register
from finespun.contract.site import Site, SiteShape
from finespun.errors import InputError, PlanError, nearest
from finespun.linalg import LowRank

Scores = Mapping[str, float | Tensor]
Choice = Mapping[str, Any]
UNCHOSEN: Choice = MappingProxyType({})
TIE = "tie"  # Plan.shared[TIE]: module -> the target whose weight it shares and whose update acts


_UNDRAWN: ContextVar[bool] = ContextVar("undrawn", default=False)


@contextmanager
def undrawn() -> Iterator[None]:
    """Inside, `build` and `bank` spend no time on first values that a file's tensors will replace:
    trained parameters may be zero. What is not stored is drawn all the same."""
    token = _UNDRAWN.set(True)
    try:
        yield
    finally:
        _UNDRAWN.reset(token)


class Unmeasured(dict[str, float | Tensor]):
    """Scores that nobody measured: enough to count parameters by, not to train with."""

    def get(self, name: str, default: Any = None) -> Tensor:
        return torch.empty(0, device="meta")


class Choices(dict[str, Mapping[str, Any]]):
    """Site name -> its decisions; PlanError where the plan holds no such site."""

    def __missing__(self, name: str) -> Mapping[str, Any]:
        raise PlanError(f"the plan has no site {name!r}; {nearest(name, self)}")


@dataclass(frozen=True)
class Plan:
    """What is decided once for the whole model before any delta exists.

    `sites` are the targets in order; `choices[site name]` holds that site's own decisions (ranks,
    factor shapes, scale) and `shared` those for all; both are plain JSON values.
    """

    sites: tuple[SiteShape, ...]
    choices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", Choices(self.choices))

    def fit(self, sites: Iterable[SiteShape]) -> None:
        """Raise PlanError unless these are the plan's own sites (order does not matter)."""
        mine, theirs = {s.name: s for s in self.sites}, {s.name: s for s in sites}
        for name in mine:
            if name not in theirs:
                raise PlanError(f"the plan adapts {name!r}, not here; {nearest(name, theirs)}")
            if mine[name] != theirs[name]:
                a, b = mine[name], theirs[name]
                raise PlanError(
                    f"the plan has {name!r} as {a.kind} {a.out_features}x{a.in_features}, "
                    f"the model as {b.kind} {b.out_features}x{b.in_features}"
                )

    def choose(self, name: str, **changes: Any) -> "Plan":
        """The same plan with one site's choices changed."""
        choices = {**self.choices, name: {**self.choices.get(name, {}), **changes}}
        return dataclasses.replace(self, choices=choices)


@dataclass(frozen=True, kw_only=True)
class Structure(Method):
    """Hyper-parameters of one way to write ΔW; subclass it beside a Delta.

    `site_kind` is "linear", or "block" for a bypass; `default_lr` is AdamW's learning rate where a
    recipe gives none, `start_lrs` that of starts that have their own; `sizes` names the options
    that make it larger. `dropout` acts on the input
    of the update while training; `seed` fixes every random draw.
    """

    dropout: float = 0.0
    seed: int = 0

    axis = "structure"
    site_kind: ClassVar[str] = "linear"
    default_lr: ClassVar[float] = 1e-3
    start_lrs: ClassVar[Mapping[str, float]] = {}
    sizes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout={self.dropout} must lie in [0, 1); try 0.05")
        if self.seed < 0:
            raise InputError(f"seed={self.seed} must not be negative; try {-self.seed}")

    @property
    def usual_lr(self) -> float:
        """The default learning rate of this start: its own in `start_lrs`, else `default_lr`."""
        return self.start_lrs.get(getattr(self, "start", ""), self.default_lr)

    @property
    def starts_at_zero(self) -> bool:
        """Whether ΔW is exactly zero after `build`."""
        return True

    def plan(self, sites: Sequence[Site], scores: Scores | None = None) -> Plan:
        """Decide for all sites at once; `scores` (site name -> importance of the site, or of its
        features or entries as a tensor) may steer sizes and choices.

        Raises PlanError where a site's shape cannot take this structure.
        """
        choices = {s.shape.name: self.choose_within(s) for s in sites}
        return Plan(tuple(s.shape for s in sites), choices)

    def choose_within(self, site: Site) -> dict[str, Any]:
        """`choose`, at the largest size that the site holds."""
        return self.choose(site)

    def choose(self, site: Site) -> dict[str, Any]:
        """One site's own decisions, as JSON values."""
        return {}

    def bank(self, plan: Plan) -> Bank | None:
        """The trained parameters that all sites of the plan share, or None."""
        return None

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> Delta:
        """The delta of one site."""
        raise NotImplementedError(f"{type(self).__name__} must say how to build a delta")

    def exactly(self, site: Site, update: LowRank, scale: float) -> "tuple[Delta, Choice] | None":
        """The delta with ΔW = scale · update, of as many ranks, and the plan's choice for it; None:
        the structure does not hold updates of any rank."""
        return None

    @property
    def holds_any(self) -> bool:
        """Whether `exactly` is written."""
        return type(self).exactly is not Structure.exactly

    def form(self, deltas: Sequence[Delta]) -> list[Factors]:
        """`low_rank()` of all deltas in as few products as possible."""
        raise NotImplementedError(f"{type(self).__name__} forms each delta on its own")

    @property
    def forms_together(self) -> bool:
        """Whether `form` is written."""
        return type(self).form is not Structure.form

    # --- counts: the one source of every figure in docs, command line and reports ----------------
    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        """Trained parameters at one site, in closed form."""
        raise NotImplementedError(f"{type(self).__name__} must count its parameters")

    def num_shared_parameters(self, plan: Plan) -> int:
        """Trained parameters in the bank."""
        return 0

    def total_parameters(self, plan: Plan) -> int:
        """Trained parameters of the whole plan."""
        own = (self.num_parameters(s, plan.choices.get(s.name, UNCHOSEN)) for s in plan.sites)
        return sum(own) + self.num_shared_parameters(plan)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """Floating point operations (2 per multiply-add) that the update adds to a forward pass
        over `tokens` rows, work that is done once per step included."""
        raise NotImplementedError(f"{type(self).__name__} must count its operations")

    # --- random draws ----------------------------------------------------------------------------
    def generator(self, site: str, purpose: str) -> torch.Generator:
        """A CPU generator for numbers that will be saved, fixed by (seed, site, purpose)."""
        digest = hashlib.blake2b(f"{self.seed}\0{site}\0{purpose}".encode(), digest_size=8)
        return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1)

    @property
    def draws(self) -> bool:
        """Whether `build` gives trained parameters their first values: not inside `undrawn`."""
        return not _UNDRAWN.get()

    def symmetric(self, site: str, purpose: str, shape: Sequence[int]) -> Tensor:
        """Numbers uniform on [-1, 1), fixed by (seed, site, purpose); zeros inside `undrawn`."""
        if not self.draws:
            return torch.zeros(()).expand(tuple(shape))
        return torch.rand(tuple(shape), generator=self.generator(site, purpose)) * 2 - 1

    def kaiming(self, site: str, purpose: str, shape: Sequence[int]) -> Tensor:
        """LoRA's A of this shape: uniform, variance 1/(3·n) for n = shape[-1] inputs."""
        return self.symmetric(site, purpose, shape) / math.sqrt(shape[-1])


@dataclass(frozen=True, kw_only=True)
class Ranked(Structure):
    """A structure with a rank. The update is multiplied by alpha / rank; alpha is 2·rank unless
    given (`default_scale` where a method's own scale is another)."""

    rank: int = 8
    alpha: float | None = None

    default_scale: ClassVar[float] = 2.0
    sizes: ClassVar[tuple[str, ...]] = ("rank",)

    aliases: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise InputError(f"rank={self.rank} must be at least 1; try 8")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"alpha={self.alpha} must be positive; try {2 * self.rank}")

    @property
    def scale(self) -> float:
        """c = alpha / rank, the factor in front of the update."""
        return self.default_scale if self.alpha is None else self.alpha / self.rank

    def rank_of(self, choice: Choice) -> int:
        """The rank that a plan's choice says, else the structure's own."""
        return int(choice.get("rank", self.rank))

    def choose(self, site: Site) -> dict[str, Any]:
        shape = site.shape
        limit = min(shape.out_features, shape.in_features)
        if self.rank > limit:
            raise PlanError(
                f"rank={self.rank} exceeds what {shape.name!r} "
                f"({shape.out_features}x{shape.in_features}) can hold; at most {limit}"
            )
        return {"rank": self.rank, "scale": self.scale}

    def plan(self, sites: Sequence[Site], scores: Scores | None = None) -> Plan:
        if sites and not any(map(self.holds, sites)):
            self.choose(sites[0])  # a rank that fits nowhere was not meant: its PlanError
        return super().plan(sites, scores)

    def holds(self, site: Site) -> bool:
        """Whether a site has room for what was asked for."""
        try:
            self.choose(site)
        except PlanError:
            return False
        return True

    def choose_within(self, site: Site) -> dict[str, Any]:
        """A layer that is too small for the rank, beside others that are not, gets the largest that
        it holds, at the same scale; PlanError where a bank fixes the rank for all, or no rank would
        do."""
        limit = min(site.shape.out_features, site.shape.in_features)
        if self.rank <= limit or type(self).bank is not Structure.bank or self.holds(site):
            return self.choose(site)
        for rank in range(limit, 0, -1):
            try:
                chosen = dataclasses.replace(self, rank=rank).choose(site)
            except InputError:
                continue
            return chosen | ({"scale": self.scale} if "scale" in chosen else {})
        return self.choose(site)


def must_be_one_of(option: str, value: object, known: Sequence[object]) -> None:
    """Raise InputError unless `value` is among the known ones."""
    if value not in known:
        choices = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        raise InputError(f"{option}={value!r} is not known; try {choices}")


def must_be_positive(**options: tuple[float | None, float]) -> None:
    """Raise InputError unless every option that is given, (value, one that would do), exceeds 0."""
    for name, (value, hint) in options.items():
        if value is not None and not value > 0:
            raise InputError(f"{name}={value} must be positive; try {hint}")


def nearest_divisor(value: int, n: int) -> int:
    """The divisor of n that is nearest to `value`, the greater of two."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - value), -d))


def must_divide(
    option: str, value: int, site: SiteShape, *more: int, sides: Sequence[str] = ("out", "in")
) -> None:
    """Raise PlanError unless `value` divides both sides of the site (or those named) and the
    parameters in `more`."""
    sizes = {"out": site.out_features, "in": site.in_features}
    wrong = [f"{side}={sizes[side]}" for side in sides if sizes[side] % value]
    if wrong:
        common = math.gcd(*(sizes[side] for side in sides), *more)
        raise PlanError(
            f"{option}={value} does not divide {' and '.join(wrong)} of {site.name!r}; "
            f"nearest that does: {nearest_divisor(value, common)}"
        )


STRUCTURES: dict[str, type[Structure]] = REGISTRY.setdefault("structure", {})
