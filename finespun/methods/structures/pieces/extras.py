"""Trained things beside a LoRA that PEFT's files hold: rows of a table for single tokens, biases.

A plan's choice for a site says so: {"tokens": [...]} is rows of a table and no LoRA there,
{"bias": true} a bias beside the update, {"only": "bias"} a bias alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract.beside import Beside
from finespun.contract.delta import Delta, Factors
from finespun.contract.site import Site, SiteShape
from finespun.errors import InputError


def extra(site: Site, choice: Mapping[str, Any]) -> Delta | None:
    """The delta of a site that carries no LoRA, by its choice; None for all others."""
    if "tokens" in choice:
        return TokensDelta(site, choice["tokens"])
    return BiasDelta(site) if choice.get("only") == "bias" else None


def extra_parameters(shape: SiteShape, choice: Mapping[str, Any]) -> int | None:
    """Parameters of such a delta; None where the choice says no such thing."""
    if "tokens" in choice:
        return len(choice["tokens"]) * table(shape)[1]
    return shape.out_features if choice.get("only") == "bias" else None


def table(shape: SiteShape) -> tuple[int, int]:
    """Rows and width of the table that a site is: one row for each token."""
    sizes = shape.out_features, shape.in_features
    return sizes[::-1] if shape.kind == "embedding" else sizes


class TokensDelta(Delta):
    """Row t of a table becomes v, for the tokens t named;  v (tokens, width).

    A table is an embedding, or a linear layer with one output for each token. The parameters are
    the rows themselves: ΔW[t] = v − W0[t]. Raises InputError for tokens that the table does not
    have.
    """

    def __init__(self, site: Site, tokens: list[int]) -> None:
        super().__init__(site)
        self.turned = site.shape.kind == "embedding"
        size, _ = table(site.shape)
        wrong = [t for t in tokens if type(t) is not int or not 0 <= t < size]
        if wrong or len(set(tokens)) != len(tokens) or not tokens:
            told = f"token {wrong[0]!r} is not in the table" if wrong else f"tokens={tokens}"
            raise InputError(
                f"{site.shape.name!r} has rows 0 to {size - 1}: {told}; name each once, and give "
                "the model its rows first (resize_token_embeddings)"
            )
        self.tokens = list(tokens)
        pick = torch.zeros(len(tokens), size)
        pick[torch.arange(len(tokens)), torch.tensor(tokens)] = 1
        self.hold("pick", pick.to(site.device))
        self.values = nn.Parameter(self.own_rows().float().clone())

    def own_rows(self) -> Tensor:
        """The base's rows of the tokens, (tokens, width)."""
        weight = self.site.weight().detach()
        return (weight.T if self.turned else weight)[self.tokens]

    def low_rank(self) -> Factors:
        pick, moved = self.held("pick", self.values), self.values - self.own_rows().to(self.values)
        return (pick, moved.T) if self.turned else (moved, pick.T)

    def written_beside(self) -> Beside:
        rows, own = self.values.detach(), self.own_rows()
        return Beside(tokens=tuple(self.tokens), rows=rows, own=own)

    def compact(self) -> tuple[Delta, dict[str, Any]]:
        return self, {"tokens": self.tokens}


class OwnBias(Delta):
    """A delta with a bias of its own, b (out,) in place of b0. Raises InputError where the layer
    has none."""

    b: nn.Parameter

    def _take_bias(self) -> None:
        bias = self.site.bias()
        if bias is None:
            raise InputError(f"{self.site.shape.name!r} has no bias that could be trained")
        self.b = nn.Parameter(bias.detach().float().clone())

    def map_bias(self, b0: Tensor) -> Tensor:
        return self.b.to(b0.dtype)


class BiasDelta(OwnBias):
    """The bias alone is trained (arXiv 2106.10199): ΔW = 0, as a product of rank one."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._take_bias()
        self.hold("A", torch.zeros(1, site.shape.in_features, device=site.device))
        self.hold("B", torch.zeros(site.shape.out_features, 1, device=site.device))

    def low_rank(self) -> Factors:
        return self.held("A", self.b), self.held("B", self.b)

    def written_beside(self) -> Beside:
        return Beside()

    def compact(self) -> tuple[Delta, dict[str, Any]]:
        return self, {"only": "bias"}
