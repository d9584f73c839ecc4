"""IA3: one trained gain for every output, or input, of a layer (arXiv 2205.05638)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Base, Delta
from finespun.contract.row_form import RowForm
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Structure,
    register,
)


@register
@dataclass(frozen=True, kw_only=True)
class IA3(Structure):
    """y = g ∘ (W0 x + b0) with g (out,), or for `feedforward` layers y = W0 (g ∘ x) + b0 with
    g (in,);  out, or in, parameters; g starts at one.

    Good for: the cheapest update there is: one number for each feature.
    Not for: tasks far from the base: it rescales features and makes no new ones.

    The paper scales the outputs of keys and values, and the inputs of the second layer of each
    feed-forward block: name the latter in `feedforward`, as whole names or dotted suffixes.
    Source: arXiv 2205.05638.
    """

    feedforward: tuple[str, ...] = ()

    kind = "ia3"
    title = "(IA)3"
    source = "arXiv 2205.05638"
    aliases = {"feedforward_modules": "feedforward"}

    def reads_input(self, name: str) -> bool:
        """Whether the gain of this site acts on its input."""
        return any(name == f or name.endswith(f".{f}") for f in self.feedforward)

    def choose(self, site: Site) -> dict[str, Any]:
        return {"input": self.reads_input(site.shape.name)}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "IA3Delta":
        return (InputGain if plan.choices[site.shape.name]["input"] else OutputGain)(site)

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        reads_input = choice.get("input", self.reads_input(shape.name))
        return shape.in_features if reads_input else shape.out_features

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        return tokens * self.num_parameters(shape, choice)


class IA3Delta(Delta):
    """The gains g of one site."""

    def __init__(self, site: Site, size: int) -> None:
        super().__init__(site)
        self.g = nn.Parameter(torch.ones(size, device=site.device))


class OutputGain(IA3Delta):
    """g (out,) acts on the bias too, outside `forward`: per-sample gradients would miss that."""

    per_sample: ClassVar[bool] = False

    def __init__(self, site: Site) -> None:
        super().__init__(site, site.shape.out_features)

    def delta(self, w0: Tensor) -> Tensor:
        return (self.g - 1)[:, None] * w0

    def map_bias(self, b0: Tensor) -> Tensor:
        return self.g * b0

    def through(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return (self.g * y).to(y.dtype)

    def own_row_form(self) -> RowForm:
        return RowForm(g_out=self.g)


class InputGain(IA3Delta):
    """g (in,)."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, site.shape.in_features)

    def delta(self, w0: Tensor) -> Tensor:
        return (self.g - 1) * w0

    def through(self, x: Tensor, base: Base) -> Tensor:
        return base((self.g * x).to(x.dtype))

    def own_row_form(self) -> RowForm:
        return RowForm(g_in=self.g)
