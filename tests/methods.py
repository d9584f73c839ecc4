"""Five structures that live in the tests alone; between them they use every part of the contract.

DoRA writes `map_weight`, HiRA `delta`, IA3 `through` with `map_weight` and `map_bias`, UniLoRA a
trained bank and an index map in the plan, Bypass a block instead of a weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finespun import contract
from finespun.contract import Bank, Delta, Plan, Ranked, Site, SiteShape, Structure
from finespun.contract.structure import UNCHOSEN


def factor_pair(delta: Delta, structure: Ranked, purpose: str = "A") -> None:
    """Give the delta A (r, in), drawn as LoRA's, and B (out, r), zero."""
    shape, g = delta.site.shape, structure.generator(delta.site.shape.name, purpose)
    drawn = torch.randn(structure.rank, shape.in_features, generator=g)
    delta.A = nn.Parameter((drawn / (3 * shape.in_features) ** 0.5).to(delta.site.device))
    delta.B = nn.Parameter(
        torch.zeros(shape.out_features, structure.rank, device=delta.site.device)
    )
    delta.scale = structure.scale


@dataclass(frozen=True, kw_only=True)
class DoRA(Ranked):
    """W = m · V / ‖V‖_row, V = W0 + c·B·A; the norm is held constant in the gradient.
    Source: arXiv 2402.09353."""

    kind: ClassVar[str] = "dora"

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "DoRADelta":
        delta = DoRADelta(site)
        factor_pair(delta, self)
        delta.m = nn.Parameter(torch.linalg.vector_norm(delta.base_weight(), dim=1))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Any = UNCHOSEN) -> int:
        return self.rank_of(choice) * (shape.in_features + shape.out_features) + shape.out_features

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Any = UNCHOSEN) -> int:
        size = shape.in_features * shape.out_features
        per_token = 2 * self.rank_of(choice) * (shape.in_features + shape.out_features)
        return tokens * (per_token + 3 * shape.out_features) + 2 * (self.rank_of(choice) + 1) * size


class DoRADelta(Delta):
    """A (r, in), B (out, r) and the magnitudes m (out,)."""

    def map_weight(self, w0: Tensor) -> Tensor:
        V = w0 + self.scale * (self.B @ self.A)
        norm = torch.linalg.vector_norm(V, dim=1).detach()
        return V * (self.m / norm.clamp_min(torch.finfo(V.dtype).tiny))[:, None]


@dataclass(frozen=True, kw_only=True)
class HiRA(Ranked):
    """ΔW = W0 ∘ (c·B·A). Source: LoRA variants study, arXiv 2601.22708."""

    kind: ClassVar[str] = "hira"

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "HiRADelta":
        delta = HiRADelta(site)
        factor_pair(delta, self)
        return delta

    def num_parameters(self, shape: SiteShape, choice: Any = UNCHOSEN) -> int:
        return self.rank_of(choice) * (shape.in_features + shape.out_features)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Any = UNCHOSEN) -> int:
        size = shape.in_features * shape.out_features
        return (2 * self.rank_of(choice) + 1) * size + 2 * tokens * size


class HiRADelta(Delta):
    """A (r, in) and B (out, r)."""

    def delta(self, w0: Tensor) -> Tensor:
        return w0 * (self.scale * (self.B @ self.A))


@dataclass(frozen=True, kw_only=True)
class IA3(Structure):
    """y = g ∘ (W0 x + b0), g = 1 at the start. Source: arXiv 2205.05638."""

    kind: ClassVar[str] = "ia3"

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "IA3Delta":
        delta = IA3Delta(site)
        delta.g = nn.Parameter(torch.ones(site.shape.out_features, device=site.device))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Any = UNCHOSEN) -> int:
        return shape.out_features

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Any = UNCHOSEN) -> int:
        return tokens * shape.out_features


class IA3Delta(Delta):
    """g (out,). Its bias moves outside `forward`, so per-sample gradients would miss that part."""

    per_sample: ClassVar[bool] = False

    def map_weight(self, w0: Tensor) -> Tensor:
        return self.g[:, None] * w0

    def map_bias(self, b0: Tensor) -> Tensor:
        return self.g * b0

    def through(self, x: Tensor, base: Any) -> Tensor:
        y = base(x)
        return y * self.g.to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class UniLoRA(Ranked):
    """All A and B of the model are entries of one trained vector θ (size,), scaled by
    1/√(times each entry is used). Source: Uni-LoRA, arXiv 2506.00799."""

    size: int = 64

    kind: ClassVar[str] = "uni"

    @property
    def starts_at_zero(self) -> bool:
        return False

    def plan(self, sites: Sequence[Site], scores: Mapping[str, float] | None = None) -> Plan:
        choices = {}
        for site in sites:
            count = self.rank * (site.shape.in_features + site.shape.out_features)
            g = self.generator(site.shape.name, "index")
            index = torch.randint(self.size, (count,), generator=g)
            choices[site.shape.name] = {**self.choose(site), "index": index.tolist()}
        used = torch.cat([torch.tensor(c["index"]) for c in choices.values()])
        counts = used.bincount(minlength=self.size).clamp_min(1)
        return Plan(tuple(s.shape for s in sites), choices, {"counts": counts.tolist()})

    def bank(self, plan: Plan) -> Bank:
        bank = Bank()
        g = self.generator("", "theta")
        bank.theta = nn.Parameter(0.4 * (torch.rand(self.size, generator=g) - 0.5))
        counts = torch.tensor(plan.shared["counts"], dtype=torch.float32)
        bank.register_buffer("norm", counts.rsqrt(), persistent=False)
        return bank

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "UniLoRADelta":
        choice = plan.choices[site.shape.name]
        index = torch.tensor(choice["index"], device=site.device)
        return UniLoRADelta(site, bank, index, choice["rank"], choice["scale"])

    def num_parameters(self, shape: SiteShape, choice: Any = UNCHOSEN) -> int:
        return 0

    def num_shared_parameters(self, plan: Plan) -> int:
        return self.size

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Any = UNCHOSEN) -> int:
        return 2 * (tokens + 1) * self.rank_of(choice) * (shape.in_features + shape.out_features)


class UniLoRADelta(Delta):
    """No parameters of its own: `index` (r·in + r·out,) says which of θ's entries it reads."""

    per_sample: ClassVar[bool] = False

    def __init__(
        self, site: Site, bank: Bank | None, index: Tensor, rank: int, scale: float
    ) -> None:
        super().__init__(site, bank)
        self.rank, self.scale = rank, scale
        self.register_buffer("index", index, persistent=False)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        values = (self.bank.theta * self.bank.norm)[self.index]
        shape, cut = self.site.shape, self.rank * self.site.shape.in_features
        A = values[:cut].view(self.rank, shape.in_features)
        return A, values[cut:].view(shape.out_features, self.rank)


@dataclass(frozen=True, kw_only=True)
class Bypass(Ranked):
    """h ← F(h) + c·B·A h around a block F of width d. Source: LoR2C's kind of adapter."""

    kind: ClassVar[str] = "bypass"
    site_kind: ClassVar[str] = "block"

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "BypassDelta":
        delta = BypassDelta(site)
        factor_pair(delta, self)
        return delta

    def num_parameters(self, shape: SiteShape, choice: Any = UNCHOSEN) -> int:
        return self.rank_of(choice) * (shape.in_features + shape.out_features)

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Any = UNCHOSEN) -> int:
        return 2 * tokens * self.num_parameters(shape, choice)


class BypassDelta(contract.Bypass):
    """A (r, d) and B (d, r)."""

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B
