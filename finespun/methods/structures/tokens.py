"""Trained rows of a table for single tokens (arXiv 2208.01618); PEFT's trainable tokens."""

from dataclasses import dataclass
from typing import Any

from finespun.contract.delta import Bank
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Structure,
    register,
)
from finespun.errors import InputError, PlanError
from finespun.methods.structures.pieces.extras import TokensDelta, table


@register
@dataclass(frozen=True, kw_only=True)
class Tokens(Structure):
    """W[t] = v for the tokens t named, all other rows as they are;  v (tokens, width).

    Good for: new or rare tokens, beside another adapter or alone.
    Not for: new behaviour: nothing but these rows of the embedding moves.

    tokens·width parameters. The table is an embedding, or a linear layer with one output for each
    token; v starts at the rows of the base. Source: arXiv 2208.01618.
    """

    tokens: tuple[int, ...] = (0,)

    kind = "tokens"
    source = "arXiv 2208.01618"
    aliases = {"token_indices": "tokens"}

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.tokens
        if not own or any(type(t) is not int or t < 0 for t in own) or len({*own}) != len(own):
            raise InputError(f"tokens={own} must be row numbers, each once; try (0, 1)")

    def choose(self, site: Site) -> dict[str, Any]:
        rows, _ = table(site.shape)
        wrong = [t for t in self.tokens if not 0 <= t < rows]
        if wrong:
            raise PlanError(
                f"tokens={wrong} are no rows of {site.shape.name!r}, which has 0 to {rows - 1}"
            )
        return {"tokens": list(self.tokens)}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> TokensDelta:
        return TokensDelta(site, plan.choices[site.shape.name]["tokens"])

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return len(choice.get("tokens", self.tokens)) * table(shape)[1]

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return (
            2
            * tokens
            * len(choice.get("tokens", self.tokens))
            * (shape.in_features + shape.out_features)
        )
