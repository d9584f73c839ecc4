"""VB-LoRA: factors put together from a few vectors of a bank that all layers share (2405.15179)."""

from collections.abc import Mapping
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
    must_be_positive,
    must_divide,
    register,
)
from finespun.errors import InputError


@register
@dataclass(frozen=True, kw_only=True)
class VBLoRA(Ranked):
    """ΔW = c·B·A; rows of A (r, in) and columns of B (out, r) are pieces of length b, each a
    mixture Σ_t w_t·v_t of the `top_k` bank vectors v with the greatest logits, w their softmax.

    Good for: files that need hold only a small bank and a few choices.
    Not for: few parameters in training: every piece has a logit for every vector.

    The bank holds h = `num_vectors` vectors of b = `vector_length` parameters, h·b for the model;
    the logits are h·r·(in + out)/b parameters a site; b must divide in and out. The bank starts
    uniform on ±`bound`, logits with deviation 0.1: the start is not the base. c is 1, or alpha / r
    where alpha is given. Source: arXiv 2405.15179.
    """

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    top_k: int = 2
    bound: float = 0.02

    kind = "vblora"
    title = "VB-LoRA"
    source = "arXiv 2405.15179"
    default_scale = 1.0
    aliases = {
        **Ranked.aliases,
        "topk": "top_k",
        "vblora_dropout": "dropout",
        "init_vector_bank_bound": "bound",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.num_vectors:
            raise InputError(
                f"top_k={self.top_k} of num_vectors={self.num_vectors} vectors cannot be chosen; "
                f"try {min(2, max(self.num_vectors, 1))}"
            )
        must_be_positive(vector_length=(self.vector_length, 256), bound=(self.bound, 0.02))

    @property
    def starts_at_zero(self) -> bool:
        return False

    def choose(self, site: Site) -> dict[str, Any]:
        must_divide("vector_length", self.vector_length, site.shape)
        return {**super().choose(site), "top_k": self.top_k}

    def bank(self, plan: Plan) -> "Vectors":
        size = self.num_vectors, self.vector_length
        return Vectors(self.symmetric("", "vectors", size) * self.bound)

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "VBLoRADelta":
        delta = VBLoRADelta(site, Vectors.at(bank, site), plan.choices[site.shape.name])
        for name, logits in delta.named_parameters():
            g = self.generator(site.shape.name, name)
            logits.data.copy_(0.1 * torch.randn(logits.shape, generator=g))
        return delta

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        pieces = (shape.in_features + shape.out_features) // self.vector_length
        return self.rank_of(choice) * pieces * self.num_vectors

    def num_shared_parameters(self, plan: Plan) -> int:
        return self.num_vectors * self.vector_length

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return (
            2
            * (tokens + self.top_k)
            * self.rank_of(choice)
            * (shape.in_features + shape.out_features)
        )


class Vectors(Bank):
    """The bank: vectors (h, b)."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)


class VBLoRADelta(Delta):
    """logits_A (r, in/b, h) and logits_B (out/b, r, h)."""

    per_sample = False

    def __init__(self, site: Site, bank: Vectors, choice: Mapping[str, Any]) -> None:
        super().__init__(site, bank)
        (h, b), rank = bank.vectors.shape, choice["rank"]
        self.scale, self.top_k = choice["scale"], choice["top_k"]
        down, up = site.shape.in_features // b, site.shape.out_features // b
        self.logits_A = nn.Parameter(torch.zeros(rank, down, h, device=site.device))
        self.logits_B = nn.Parameter(torch.zeros(up, rank, h, device=site.device))

    def mixed(self, logits: Tensor) -> Tensor:
        """Logits (..., h) -> vectors (..., b)."""
        bank: Any = self.bank
        top, index = logits.topk(self.top_k, dim=-1)
        vectors: Tensor = (top.softmax(-1).unsqueeze(-1) * bank.vectors[index]).sum(-2)
        return vectors

    def low_rank(self) -> Factors:
        A = self.mixed(self.logits_A).flatten(1)
        return A, self.mixed(self.logits_B).transpose(1, 2).flatten(0, 1)
