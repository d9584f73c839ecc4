"""S2FT: whole heads and channels are trained, in the layers that write and read them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finespun.contract.delta import Bank
from finespun.contract.need import Need
from finespun.contract.site import Coupling, Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Scores,
    Structure,
    must_be_one_of,
    register,
)
from finespun.errors import InputError, PlanError
from finespun.linalg import streams
from finespun.methods.structures.pieces import units
from finespun.methods.structures.pieces.lines import ColumnsDelta, LinesDelta, RowsDelta

SELECT = ("random", "weight", "activation", "product", "gradient")
SCORES = {
    "activation": Need.ACTIVATIONS,
    "product": Need.ACTIVATIONS,
    "gradient": Need.GRADIENTS,
}
MEASURES = {Need.ACTIVATIONS: "mean_activations", Need.GRADIENTS: "estimate_gradients"}


@register
@dataclass(frozen=True, kw_only=True)
class S2FT(Structure):
    """ΔW = D·Sᵀ with D (out, s), or S·D with D (s, in): s chosen columns, or rows, of W0 change.

    Good for: keeping less for the backward pass than LoRA; changing few units; exact merging.
    Not for: the smallest adapters: each chosen column has as many parameters as the layer has
    outputs.

    Columns of layers that read hidden features of a block (o_proj, down_proj, fc2), rows of layers
    that write them (v_proj, up_proj, fc1); layers of one block train the same units. D starts at
    zero, s·out or s·in parameters; the gradient and what is kept for it are of the slice alone.
    `channels` and `heads` are the shares of units to train, of feed-forward channels and of heads
    (where values or keys are adapted, those that share them count as one), at least one in each
    block; with `per_layer=False` they are drawn from all blocks together, as in the paper, and some
    layers may get none. `select`: "random" by seed; "weight" by ‖W0‖ of a unit in the layers
    adapted; "activation" by its mean absolute value, "product" by weight times activation and
    "gradient" by ‖∂L/∂W0‖ of the unit, from the `scores` of `adapt` (recipes measure them).
    `largest=False` takes the smallest instead.
    `outputs` names layers that are trained by rows though their names do not show it; other unknown
    layers are trained by columns. Source: arXiv 2412.06289.
    """

    channels: float = 0.02
    heads: float = 0.052
    select: Literal["random", "weight", "activation", "product", "gradient"] = "random"
    largest: bool = True
    per_layer: bool = True
    outputs: tuple[str, ...] = ()

    kind = "s2ft"
    sizes = ("channels", "heads")
    source = "arXiv 2412.06289"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, share in (("channels", self.channels), ("heads", self.heads)):
            if not 0 < share <= 1:
                raise InputError(f"{name}={share} must lie in (0, 1]; try 0.02")
        must_be_one_of("select", self.select, SELECT)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({SCORES[self.select]} if self.select in SCORES else ())

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
        if self.needs and scores is None:
            raise PlanError(
                f"select={self.select!r} needs scores: pass adapt(..., scores=...), made by "
                f"driver.{MEASURES[SCORES[self.select]]}, or select='weight'"
            )
        known: Scores = {} if scores is None else scores
        blocks, chosen = units.blocks_of(sites, self.coupling), dict[str, list[int]]()
        for kind, share in (("heads", self.heads), ("channels", self.channels)):
            own = {n: b for n, b in blocks.items() if b[0][1].kind == kind}
            for pool in [{n: b} for n, b in own.items()] if self.per_layer else [own]:
                if pool:
                    where = next(iter(pool)) if self.per_layer else kind
                    chosen |= units.split(self._draw(pool, where, share, known), pool)
        choices = {
            site.shape.name: {"side": c.side, "of": c.units, "units": chosen[block]}
            for block, members in blocks.items()
            if chosen[block]
            for site, c in members
        }
        return Plan(tuple(s.shape for s in sites if s.shape.name in choices), choices)

    def _draw(
        self, pool: Mapping[str, units.Members], where: str, share: float, scores: Scores
    ) -> Tensor:
        """The units to train, counted through the pool."""
        size = sum(members[0][1].units for members in pool.values())
        count = share_of(size, share)
        if self.select == "random":
            return streams.choice(streams.key(self.seed, where, "s2ft"), size, count)
        measures: list[Callable[[Site], Tensor]] = []
        if self.select in ("weight", "product"):
            measures.append(lambda site: site.weight())
        if self.needs:
            measures.append(lambda site: units.given(scores, site))
        values = torch.cat([units.importance(members, measures) for members in pool.values()])
        return values.argsort(descending=self.largest, stable=True)[:count]

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> LinesDelta:
        choice, shape = plan.choices[site.shape.name], site.shape
        rows = choice["side"] == "out"
        size = shape.out_features if rows else shape.in_features
        found = units.lines(choice["units"], choice["of"], size)
        return (RowsDelta if rows else ColumnsDelta)(site, found)

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        """Of the units chosen; without a choice, of a layer that shares nothing."""
        if "units" in choice:
            size = shape.out_features * shape.in_features
            return int(size // choice["of"] * len(choice["units"]))
        size = shape.out_features if self.alone(shape).side == "out" else shape.in_features
        return shape.out_features * shape.in_features // size * share_of(size, self.channels)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return 2 * tokens * self.num_parameters(shape, choice)


def share_of(size: int, share: float) -> int:
    """⌊share·size⌋, at least one."""
    return max(1, math.floor(share * size + 1e-9))
