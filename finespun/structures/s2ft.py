"""S2FT: whole heads and channels are trained, in the layers that write and read them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.errors import InputError, PlanError, nearest
from finespun.linalg import streams
from finespun.structures.delta import Bank, Base, Delta, Factors
from finespun.structures.site import Coupling, Site, SiteShape
from finespun.structures.structure import Plan, Scores, Structure, register

SELECT = ("random", "weight", "score", "product")
Members = list[tuple[Site, Coupling]]


@register
@dataclass(frozen=True, kw_only=True)
class S2FT(Structure):
    """ΔW = D·Sᵀ with D (out, s), or S·D with D (s, in): s chosen columns, or rows, of W0 change.

    Good for: steps cheaper than LoRA's, changing few units of each block; exact merging.
    Not for: the smallest adapters: each chosen column has as many numbers as the layer has outputs.

    Columns of layers that read hidden features of a block (o_proj, down_proj, fc2), rows of layers
    that write them (v_proj, up_proj, fc1); layers of one block train the same units. D starts at
    zero, s·out or s·in numbers; the gradient and what is kept for it are of the slice alone.
    `channels` and `heads` are the shares of units to train, of feed-forward channels and of heads
    (those that share keys and values count as one), at least one in each block; with
    `per_layer=False` they are drawn from all blocks together, as in the paper, and some layers may
    get none. `select`: "random" by seed; "weight" by ‖W0‖ of a unit in the layers adapted; "score"
    by the scores given to `adapt`, of a layer's entries (gradients) or features (mean absolute
    activations); "product" by weight times score. `largest=False` takes the smallest instead.
    `outputs` names layers that are trained by rows though their names do not tell; other unknown
    layers are trained by columns. Source: arXiv 2412.06289.
    """

    channels: float = 0.02
    heads: float = 0.052
    select: Literal["random", "weight", "score", "product"] = "random"
    largest: bool = True
    per_layer: bool = True
    outputs: tuple[str, ...] = ()

    kind = "s2ft"
    source = "arXiv 2412.06289"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, share in (("channels", self.channels), ("heads", self.heads)):
            if not 0 < share <= 1:
                raise InputError(f"{name}={share} must lie in (0, 1]; try 0.02")
        if self.select not in SELECT:
            raise InputError(f"select={self.select!r} is not known; {nearest(self.select, SELECT)}")

    def alone(self, shape: SiteShape) -> Coupling:
        """A layer that shares nothing: its inputs are chosen, its outputs where named so."""
        if any(f".{shape.name}".endswith(f".{name}") for name in self.outputs):
            return Coupling(shape.name, "out", shape.out_features)
        return Coupling(shape.name, "in", shape.in_features)

    def coupling(self, site: Site) -> Coupling:
        """What a site shares with others; `outputs` says it better than names."""
        alone, known = self.alone(site.shape), site.coupling
        return alone if known is None or alone.side == "out" != known.side else known

    def plan(self, sites: Sequence[Site], scores: Scores | None = None) -> Plan:
        if self.select in ("score", "product") and scores is None:
            raise PlanError(
                f"select={self.select!r} needs scores: pass adapt(..., scores={{layer: tensor}}), "
                "or select='weight'"
            )
        blocks: dict[str, Members] = {}
        for site in sites:
            found = self.coupling(site)
            blocks.setdefault(found.name, []).append((site, found))
        blocks = {name: _finest(members) for name, members in blocks.items()}
        chosen: dict[str, list[int]] = {}
        for kind, share in (("heads", self.heads), ("channels", self.channels)):
            own = {n: b for n, b in sorted(blocks.items()) if b[0][1].kind == kind}
            pools = [{n: b} for n, b in own.items()] if self.per_layer else [own]
            for pool in filter(None, pools):
                chosen |= self._draw(pool, kind, share, scores or {})
        choices = {
            site.shape.name: {"side": c.side, "of": c.units, "units": chosen[block]}
            for block, members in blocks.items()
            if chosen[block]
            for site, c in members
        }
        return Plan(tuple(s.shape for s in sites if s.shape.name in choices), choices)

    def _draw(
        self, pool: Mapping[str, Members], kind: str, share: float, scores: Scores
    ) -> dict[str, list[int]]:
        """The units to train of each block, rising."""
        sizes = [members[0][1].units for members in pool.values()]
        count = share_of(sum(sizes), share)
        if self.select == "random":
            owner = next(iter(pool)) if self.per_layer else kind
            taken = streams.choice(streams.key(self.seed, owner, "s2ft"), sum(sizes), count)
        else:
            values = torch.cat([self._importance(m, scores) for m in pool.values()])
            taken = values.argsort(descending=self.largest, stable=True)[:count]
        mask = torch.zeros(sum(sizes), dtype=torch.bool)
        mask[taken] = True
        return {n: m.nonzero()[:, 0].tolist() for n, m in zip(pool, mask.split(sizes))}

    def _importance(self, members: Members, scores: Scores) -> Tensor:
        """√ Σ of squares over each unit, in all layers of the block, (units,)."""
        total = torch.zeros(members[0][1].units, dtype=torch.float64)
        for site, c in members:
            value = torch.ones((), dtype=torch.float64)
            if self.select != "score":
                value = _by_unit(site.weight(), site.shape, c)
            if self.select != "weight":
                value = value * _by_unit(_given(scores, site.shape), site.shape, c)
            total += value
        return total.sqrt()

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "S2FTDelta":
        choice, shape = plan.choices[site.shape.name], site.shape
        rows = choice["side"] == "out"
        width = (shape.out_features if rows else shape.in_features) // choice["of"]
        units = torch.tensor(choice["units"])
        lines = (units[:, None] * width + torch.arange(width)).flatten()
        return (RowsDelta if rows else ColumnsDelta)(site, lines)

    def numbers(self, shape: SiteShape) -> int:
        """Of a layer that shares nothing; `total` asks the plan."""
        size = shape.out_features if self.alone(shape).side == "out" else shape.in_features
        return shape.out_features * shape.in_features // size * share_of(size, self.channels)

    def total(self, plan: Plan) -> int:
        sizes = {s.name: s.out_features * s.in_features for s in plan.sites}
        return sum(sizes[n] // c["of"] * len(c["units"]) for n, c in plan.choices.items())

    def flops(self, shape: SiteShape, tokens: int = 1) -> int:
        return 2 * tokens * self.numbers(shape)


class S2FTDelta(Delta):
    """D beside `lines` (s,), the chosen rows (`dim` 0) or columns (1) of the weight, rising."""

    dim: ClassVar[int]

    def __init__(self, site: Site, lines: Tensor) -> None:
        super().__init__(site)
        size = [site.shape.out_features, site.shape.in_features]
        size[self.dim] = len(lines)
        self.D = nn.Parameter(torch.zeros(size, device=site.device))
        self.stand(lines)

    def stand(self, lines: Tensor) -> None:
        """Let the chosen lines stand at these places of the weight."""
        self.hold("lines", lines.to(self.D.device))
        self.entries: Tensor | None = None
        self.first = bool(torch.equal(lines.cpu(), torch.arange(len(lines))))

    @property
    def lines(self) -> Tensor:
        """Places of the chosen rows or columns, int64 (s,)."""
        return self.held("lines", self.D)

    def _places(self, size: int) -> Tensor:
        """S as (s, size): one in each row."""
        every = torch.arange(size, device=self.D.device)
        return (self.lines[:, None] == every).to(self.D.dtype)

    def direct(self, tokens: int, formed: bool) -> bool:
        return not self.adjusted

    def sparse(self) -> tuple[Tensor, Tensor]:
        shape, device = self.site.shape, self.D.device
        if self.entries is None or self.entries.device != device:
            rows = torch.arange(shape.out_features, device=device)
            columns = torch.arange(shape.in_features, device=device)
            rows, columns = (self.lines, columns) if self.dim == 0 else (rows, self.lines)
            self.entries = (rows[:, None] * shape.in_features + columns).flatten()
        return self.entries, self.D.flatten()


class ColumnsDelta(S2FTDelta):
    """D (out, s): only x[..., lines] is multiplied, and kept for the backward pass."""

    dim = 1

    def low_rank(self) -> Factors:
        return self._places(self.site.shape.in_features), self.D

    def forward(self, x: Tensor) -> Tensor:
        if self.adjusted:
            return super().forward(x)
        s = len(self.lines)
        own = x[..., :s].contiguous() if self.first else x.index_select(-1, self.lines)
        return F.linear(own.to(self.D.dtype), self.D)


class RowsDelta(S2FTDelta):
    """D (s, in): only δ[..., lines] reaches it in the backward pass."""

    dim = 0

    def low_rank(self) -> Factors:
        return self.D, self._places(self.site.shape.out_features).T

    def forward(self, x: Tensor) -> Tensor:
        if self.adjusted:
            return super().forward(x)
        size = self.site.shape.out_features
        zeros = torch.zeros(*x.shape[:-1], size, dtype=self.D.dtype, device=x.device)
        return self._add(zeros, x)

    def through(self, x: Tensor, base: Base) -> Tensor:
        return super().through(x, base) if self.adjusted else self._add(base(x), x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        own = F.linear(x.to(self.D.dtype), self.D).to(y.dtype)
        return y.index_add(-1, self.lines, own)


def share_of(size: int, share: float) -> int:
    """⌊share·size⌋, at least one."""
    return max(1, math.floor(share * size + 1e-9))


def _finest(members: Members) -> Members:
    """Units taken apart where all the layers have the same pieces of them."""
    parts = {c.parts for _, c in members}
    if len(parts) > 1:
        return members
    return [(site, replace(c, units=c.units * c.parts, parts=1)) for site, c in members]


def wide(value: Tensor) -> torch.dtype:
    """The dtype to measure a tensor in."""
    return torch.promote_types(value.dtype, torch.float32)


def _by_unit(value: Tensor, shape: SiteShape, c: Coupling) -> Tensor:
    """Sums of squares over the units, (units,) in float64: of a tensor like the weight (out, in),
    or of one number for each feature or unit. Raises InputError for other shapes."""
    size = shape.out_features if c.side == "out" else shape.in_features
    if value.is_meta:
        return torch.zeros(c.units, dtype=torch.float64)
    if value.shape == (shape.out_features, shape.in_features):
        dim = 1 if c.side == "out" else 0
        value = torch.linalg.vector_norm(value.detach(), dim=dim, dtype=wide(value))
    if value.shape not in ((size,), (c.units,)):
        raise InputError(
            f"scores for {shape.name!r} are {tuple(value.shape)}, expected "
            f"({shape.out_features}, {shape.in_features}), ({size},) or ({c.units},)"
        )
    return value.detach().double().cpu().view(c.units, -1).square().sum(1)


def _given(scores: Scores, shape: SiteShape) -> Tensor:
    found = scores.get(shape.name)
    if isinstance(found, Tensor):
        return found
    raise InputError(
        f"{shape.name!r} needs scores of its features or entries, a tensor, not {found!r}; "
        f"{nearest(shape.name, scores)}"
    )
