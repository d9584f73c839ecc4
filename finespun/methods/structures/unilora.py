"""Uni-LoRA: every entry of every factor copies one entry of one trained vector (2506.00799)."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta, Factors
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Ranked,
    Scores,
    must_be_positive,
    register,
)
from finespun.linalg import streams
from finespun.methods.structures.pieces.frozen import DRAWS, Frozen


@register
@dataclass(frozen=True, kw_only=True)
class UniLoRA(Ranked):
    """ΔW = c·B·A at every site, all A and B being slices of θ_D = P θ, θ (d,) trained: d
    parameters.

    Good for: a budget for the whole model: d is any number you like.
    Not for: a start that must be the base's, unless it is asked for exactly; per-sample gradients.

    D = Σ r·(in + out) over the sites, sorted by name, A before B. Row i of P holds one number,
    1/√n_j at column j = π(i), where n_j of D rows read column j; n_j is ⌊D/d⌋ or ⌈D/d⌉, hence
    PᵀP = I. π comes from the seed. `size` is d, at most D; unless given, D/20 but at least 4,096.
    θ is uniform on ±`bound`, so the start is not the base. c is 1, or alpha / r where alpha is
    given. Rates are LoRA's times √(D/d) (`rate_factor`). Source: arXiv 2506.00799.
    """

    rank: int = 4
    size: int | None = None
    bound: float = 0.02

    kind = "unilora"
    title = "Uni-LoRA"
    sizes = ("size",)
    source = "arXiv 2506.00799"
    default_scale = 1.0
    aliases = {
        **Ranked.aliases,
        "theta_d_length": "size",
        "proj_seed": "seed",
        "unilora_dropout": "dropout",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        must_be_positive(size=(self.size, 4096), bound=(self.bound, 0.02))

    @property
    def starts_at_zero(self) -> bool:
        return False

    def plan(self, sites: Sequence[Site], scores: Scores | None = None) -> Plan:
        plan, total = super().plan(sites, scores), 0
        for shape in sorted(plan.sites):
            plan = plan.choose(shape.name, offset=total)
            total += self.rank * (shape.in_features + shape.out_features)
        size = max(4096, total // 20) if self.size is None else self.size
        return dataclasses.replace(plan, shared={"total": total, "size": min(size, total)})

    def bank(self, plan: Plan) -> "Theta":
        theta = self.symmetric("", "theta", (plan.shared["size"],)) * self.bound
        return Theta(theta, plan.shared["total"], self.seed)

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "UniLoRADelta":
        return UniLoRADelta(site, Theta.at(bank, site), plan.choices[site.shape.name])

    def form(self, deltas: Sequence[Delta]) -> list[Factors]:
        uni = [d for d in deltas if isinstance(d, UniLoRADelta)]
        if not uni:
            return []
        values = uni[0].theta.unfold()
        return [d.cut(values[d.offset : d.offset + d.count]) for d in uni]

    def rate_factor(self, plan: Plan) -> float:
        """√(D/d): a step of θ moves each entry of A and B by √(d/D) of it."""
        return float((plan.shared["total"] / plan.shared["size"]) ** 0.5)

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return 0

    def num_shared_parameters(self, plan: Plan) -> int:
        return int(plan.shared["size"])

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return (2 * tokens + 1) * self.rank_of(choice) * (shape.in_features + shape.out_features)


def spread(key: streams.Key, sizes: tuple[int, ...]) -> Tensor:
    """`sizes` = (D, d): a column below d for each of D rows, int32 (D,), in random order; columns
    below D mod d are met ⌈D/d⌉ times, the others ⌊D/d⌋ times."""
    total, size = sizes
    return (streams.permutation(key, total) % size).int()


DRAWS["spread"] = spread


class Theta(Bank):
    """theta (d,) and the map π from D rows to its columns, which a seed regenerates."""

    def __init__(self, theta: Tensor, total: int, seed: int) -> None:
        super().__init__()
        self.index = Frozen("spread", seed, ("unilora", "columns"), (total, len(theta)))
        self.theta = nn.Parameter(theta)

    def unfold(self, offset: int = 0, count: int | None = None) -> Tensor:
        """Entries offset .. offset + count of θ_D = P θ; all of them unless given otherwise."""
        total, size = self.index.shape
        columns = torch.arange(size, device=self.theta.device)
        uses = total // size + (columns < total % size).to(self.theta.dtype)
        index = self.index.on(self.theta.device)
        rows = index[offset : total if count is None else offset + count]
        return (self.theta / uses.sqrt())[rows]


class UniLoRADelta(Delta):
    """No parameters of its own: A (r, in) and B (out, r) are entries of θ_D from `offset` on."""

    per_sample = False

    def __init__(self, site: Site, bank: Theta, choice: Mapping[str, Any]) -> None:
        super().__init__(site, bank)
        self.scale, self.rank, self.offset = choice["scale"], choice["rank"], choice["offset"]
        self.count = self.rank * (site.shape.in_features + site.shape.out_features)

    @property
    def theta(self) -> Theta:
        """The bank."""
        bank: Any = self.bank
        return bank

    def cut(self, values: Tensor) -> Factors:
        """A (r, in) and B (out, r) from their entries one after the other."""
        shape = self.site.shape
        A, B = values.split([self.rank * n for n in (shape.in_features, shape.out_features)])
        return A.view(self.rank, -1), B.view(-1, self.rank)

    def low_rank(self) -> Factors:
        return self.cut(self.theta.unfold(self.offset, self.count))
