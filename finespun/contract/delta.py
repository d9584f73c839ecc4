"""One site's trainable update ΔW: what a method writes, and what follows from it.

A method subclasses `Delta` and writes the cheapest true description of its update:

    low_rank()       A (r, in), B (out, r)     ΔW = scale · B A
    delta(w0)        (out, in) -> (out, in)    ΔW itself
    map_weight(w0)   (out, in) -> (out, in)    W0 + ΔW
    through(x, base) (..., in) -> (..., out)   the adapted layer's output around base(x)

`product(x)` beside one of them where ΔW x has a cheaper way of its own, and `map_bias(b0)` if it
moves the bias. Everything else (forward, merge, calculus, masks, exact start) follows from what is
written. Around factors stand, in this order, exact start, gate and scale:

    ΔW = scale · Σ_i g_i (B_i A_i − B0_i A0_i)
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from finespun.contract import fitting
from finespun.contract.bank import Bank
from finespun.contract.beside import Beside
from finespun.contract.groups import Group
from finespun.contract.products import Product, products_of, why_none
from finespun.contract.roles import role_of
from finespun.contract.row_form import RowForm
from finespun.contract.wrapping import Factors, Wrapped
from finespun.errors import StateError
from finespun.linalg import LowRank

__all__ = ["Bank", "Base", "Bypass", "Delta", "Factors", "module_group"]

Base = Callable[[Tensor], Tensor]


class Delta(Wrapped):
    """ΔW of one site: `forward(x) = ΔW x` for x (..., in_features) is the definition.

    `scale` multiplies B A of `low_rank` (alpha / r in LoRA). Trained parameters are float32 unless
    built otherwise and keep their precision through `model.to(torch.bfloat16)`. `reads_base` is
    False where `delta(w0)` takes the shape of W0 alone: then ΔW is known without the base.
    """

    mergeable: ClassVar[bool] = True
    per_sample: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = ("low_rank", "delta", "map_weight", "map_bias", "through", "product")
        cls.written = frozenset(n for n in names if getattr(cls, n) is not getattr(Delta, n))

    def hold(self, name: str, tensor: Tensor) -> None:
        """Keep a frozen tensor that is neither saved nor a buffer (Opacus takes no layer that has
        buffers); read it with `held`."""
        self.__dict__.setdefault("_held", {})[name] = tensor

    def held(self, name: str, like: Tensor) -> Tensor:
        """A tensor given to `hold`, on the device and, unless it holds integers, in the dtype of
        another; it is kept there."""
        tensor: Tensor = self.__dict__["_held"][name]
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.device != like.device or tensor.dtype != dtype:
            with torch.inference_mode(False):
                tensor = tensor.to(like.device, dtype)
            if not like.is_meta:
                self.__dict__["_held"][name] = tensor
        return tensor

    # --- what a method writes -------------------------------------------------------------------
    def map_bias(self, b0: Tensor) -> Tensor:
        """The adapted bias, shape (out,)."""
        return b0

    def sparse(self) -> tuple[Tensor, Tensor] | None:
        """Where ΔW is not zero, (K,) int64, rising, counted row by row, and the K values there; or
        None: it is dense. Such an update is merged and taken back by writing K parameters."""
        return None

    def through(self, x: Tensor, base: Base) -> Tensor:
        """The adapted layer's output for x (..., in), built around `base`, which computes
        x W0ᵀ + b0. Written only where it is cheaper than the other forms."""
        return base(x) + self(x)

    def product(self, x: Tensor) -> Tensor:
        """ΔW x, scale included, without forming A and B or ΔW; not asked where a gate or an exact
        start stands between."""
        raise NotImplementedError(f"{type(self).__name__} has no product of its own")

    def forward(self, x: Tensor) -> Tensor:
        """ΔW x for x (..., in), in the precision of the trained parameters."""
        if self.dead and "low_rank" not in self.written:
            like = next(iter(self.trained_parameters()), x)
            return like.new_zeros(*x.shape[:-1], self.site.shape.out_features)
        if "product" in self.written and not self.adjusted:
            return self.product(x)
        pair = self.factors()
        if pair is not None:
            A, B = pair
            return F.linear(F.linear(x.to(A.dtype), A), B) * self.scale
        w0 = self.base_weight()
        return F.linear(x.to(w0.dtype), self.dense(w0))

    def direct(self, tokens: int, formed: bool) -> bool:
        """Whether `forward` beats forming A and B, or ΔW where there are none, for this many rows
        of x (`formed`: they are already at hand)."""
        return "product" in self.written and not self.adjusted

    def groups(self, kind: str) -> list[Group]:
        """The groups of parameters of this kind ("rank", "term", ...) that can be switched off."""
        return []

    def live(self, kind: str) -> list[Group]:
        """The groups of this kind that have not been switched off."""
        masks = self.masks()

        def alive(group: Group) -> bool:
            return all(
                name not in masks or bool(masks[name][at].any()) for name, at in group.slices
            )

        return [group for group in self.groups(kind) if alive(group)]

    def own_row_form(self) -> RowForm | None:
        """The adapted layer as gains and a product, before exact start, gate and death; written
        where an update without `low_rank` has one."""
        return None

    def start_from(self, gradient: Tensor) -> None:
        """Choose or draw what training begins with, from ∂L/∂W0 (out, in). Raises StateError where
        the method does not look at it (`Structure.wants_gradient`)."""
        raise StateError(f"{type(self).__name__} does not start from gradients")

    @property
    def lines(self) -> Tensor | None:
        """The rows, or the columns, of W0 that are all it changes, int64 (s,); None for others."""
        return None

    def stand(self, lines: Tensor) -> None:
        """Let its lines stand at these places of the weight."""
        raise StateError(f"{type(self).__name__} chooses no lines")

    def written_beside(self) -> Beside | None:
        """What stands for it in a file of LoRAs where it is more than one low-rank product."""
        return None

    def diagnostics(self) -> dict[str, float]:
        """Parameters worth logging about the health of this update."""
        return {}

    def compact(self) -> "tuple[Delta, dict[str, Any]] | None":
        """This update without what was switched off, and the plan's choices for it; None where
        only a LoRA of lower rank can say it."""
        return None

    # --- what the machinery reads ---------------------------------------------------------------
    def assign(
        self, update: LowRank | Tensor, covariance: Tensor | None = None, refine: int = 0
    ) -> float:
        """Become the nearest of another update, scale included, and return the relative error
        ‖(ΔW' − ΔW)·C^½‖ / ‖ΔW·C^½‖, C = `covariance` (in, in) of the layer's inputs, I without it.

        Least squares over all trained parameters, those of a bank included; `refine` adds steps
        where a closed form is taken instead. Nothing is drawn: equal calls give equal results.
        """
        return fitting.fit(self, update, covariance)

    def take_factors(self, A: Tensor, B: Tensor, apart: bool = False, refine: int = 0) -> float:
        """Begin with A (r, in) and B (out, r), scale not included, and return the relative error
        ‖B̂ Â − B A‖ / ‖B A‖; B = 0 sets A alone.

        A form of other factors becomes the nearest of their product (`assign`), or, where it has
        two sides of its own, takes the r directions up to a rotation: (Q A, B Qᵀ), or with `apart`
        (Q A, B Q'), which keeps AᵀA and B Bᵀ. `refine` as in `assign`.
        """
        return self.assign(LowRank(A, B * self.scale), refine=refine)

    def predicted(self, update: LowRank) -> float | None:
        """The error of `assign` where singular values give it in advance."""
        return None

    def products(self) -> list[Product]:
        """What is bilinear in the update, as views of its parameters (`contract.products`); where
        nothing is, [], and `products_reason` says why."""
        return products_of(self)

    @property
    def products_reason(self) -> str:
        """Why there are no `products`; empty where there are, and for a dead update."""
        if self.dead or self.products():
            return ""
        return f"{self.site.shape.name!r} ({type(self).__name__}) has no products: {why_none(self)}"

    def row_form(self) -> RowForm | None:
        """The adapted layer at strength 1 as gains and a low-rank product, or None: ΔW is dense,
        and `row_form_reason` says so."""
        if self.dead:
            return RowForm()
        pair = self.factors()
        if pair is not None:
            return RowForm(A=pair[0], B=pair[1] * self.scale, db=self.bias_change())
        form = self.own_row_form()
        start = None if self.origin is None else self.origin.own_row_form()
        return form if form is None or start is None else form.less(start)

    @property
    def row_form_reason(self) -> str:
        """Why there is no `row_form`; empty where there is one."""
        own = type(self).own_row_form is not Delta.own_row_form
        if own or self.dead or "low_rank" in self.written:
            return ""
        shape = self.site.shape
        return (
            f"the update of {shape.name!r} ({type(self).__name__}) is a dense "
            f"{shape.out_features}x{shape.in_features} matrix without factors or gains; merge it, "
            "or take as_low_rank(rank)"
        )

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """‖ΔW‖ of every row, shape (out,). From factors by a QR of Aᵀ, in·r² + out·r² operations
        and nothing of size out x in, where r < in; else from ΔW formed."""
        pair = self.factors()
        if pair is not None and pair[0].shape[0] < pair[0].shape[1]:
            A, B = pair
            core = torch.linalg.qr(A.mT, mode="r")[1].mT
            return torch.linalg.vector_norm(B @ core, dim=1) * abs(self.scale)
        w0 = self.base_weight() if self.reads_base and pair is None else self.blank()
        return torch.linalg.vector_norm(self.dense(w0), dim=1)

    def bias_change(self) -> Tensor | None:
        """b − b0, shape (out,), or None when the bias stays."""
        b0 = self.site.bias() if "map_bias" in self.written else None
        if b0 is None or self.dead:
            return None
        b0 = b0.detach().float()
        if self.origin is None:
            return self.map_bias(b0) - b0
        return self.map_bias(b0) - self.origin.map_bias(b0).detach()

    def as_low_rank(self, rank: int | None = None, energy: float | None = None) -> LowRank:
        """ΔW as a LowRank: exact where the method has factors and no limit is asked, else the best
        approximation of rank `rank`, or that keeps the share `energy` of the squared norm."""
        pair = self.factors()
        if pair is None:
            w0 = self.base_weight() if self.reads_base else self.blank()
            return LowRank.from_dense(self.dense(w0).detach(), rank, energy)
        exact = LowRank(pair[0].detach(), pair[1].detach() * self.scale)
        return exact if rank is None and energy is None else exact.squeeze(rank, energy)


class Bypass(Delta):
    """h ← F(h) + ΔW h around a block F, not inside a weight; never mergeable (LoR2C's kind)."""

    mergeable: ClassVar[bool] = False


def module_group(delta: Delta) -> Group:
    """All parameters of one site as a single group: switched off, it is the update that dies."""
    own = [n for n, _ in delta.named_parameters() if role_of(n)[0] != "start"]
    return Group("module", delta.site.shape.name, tuple((n, (slice(None),)) for n in own))
