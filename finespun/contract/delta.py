"""One site's trainable update ΔW, and the modules that go with it: Bank and Bypass.

A method subclasses `Delta` and writes the cheapest true description of its update:

    low_rank()       A (r, in), B (out, r)     ΔW = scale · B A
    delta(w0)        (out, in) -> (out, in)    ΔW itself
    map_weight(w0)   (out, in) -> (out, in)    W0 + ΔW
    through(x, base) (..., in) -> (..., out)   the adapted layer's output around base(x)

`product(x)` beside one of them where ΔW x has a cheaper way of its own, and `map_bias(b0)` if it
moves the bias. Everything else (forward, merge, calculus, masks, exact
start) follows from what is written.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract.groups import Group
from finespun.contract.site import Site
from finespun.errors import InputError, StateError
from finespun.linalg import LowRank

Factors = tuple[Tensor, Tensor]
Base = Callable[[Tensor], Tensor]


class _Precise(nn.Module):
    """Follows the model to another device or a higher precision, never to a lower one."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype.itemsize >= tensor.dtype.itemsize:
                return moved
            return tensor.to(moved.device)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self


class Bank(_Precise):
    """Trained numbers that several deltas share; owned by the adapter and saved once. They keep
    their precision as a delta's do."""

    @classmethod
    def at(cls, bank: "Bank | None", site: Site) -> Self:
        """The bank that a site's delta will read, moved to the site's device. Raises InputError
        where it is not of this class."""
        if not isinstance(bank, cls):
            raise InputError(
                f"{site.shape.name!r} shares trained numbers: build it with bank(plan), a "
                f"{cls.__name__}, not {bank!r}"
            )
        return bank.to(site.device)

    def keep_start(self) -> "Bank":
        """A frozen copy of today's numbers, made once, saved with the bank."""
        if "start" not in self._modules:
            self.start = copy.deepcopy(self).requires_grad_(False)
        return self._modules["start"]  # type: ignore[return-value]


class Delta(_Precise):
    """ΔW of one site: `forward(x) = ΔW x` for x (..., in_features) is the definition.

    `scale` multiplies B A of `low_rank` (alpha / r in LoRA). Trained numbers are float32 unless
    built otherwise and keep their precision through `model.to(torch.bfloat16)`. `reads_base` is
    False where `delta(w0)` takes the shape of W0 alone: then ΔW is known without the base.
    """

    mergeable: ClassVar[bool] = True
    per_sample: ClassVar[bool] = True
    reads_base: ClassVar[bool] = True
    written: ClassVar[frozenset[str]] = frozenset()
    scale: float = 1.0

    site: Site
    bank: Bank | None

    def __init__(self, site: Site, bank: Bank | None = None) -> None:
        super().__init__()
        self.refer(site, bank)

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
        another; it stays so."""
        tensor: Tensor = self.__dict__["_held"][name]
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.device != like.device or tensor.dtype != dtype:
            with torch.inference_mode(False):
                tensor = tensor.to(like.device, dtype)
            if not like.is_meta:
                self.__dict__["_held"][name] = tensor
        return tensor

    def refer(self, site: Site, bank: Bank | None) -> None:
        """Point at the site and the bank without registering them as children."""
        self.__dict__["site"] = site
        self.__dict__["bank"] = bank

    @property
    def origin(self) -> "Delta | None":
        """The frozen copy that `keep_start` made."""
        return self._modules.get("start")  # type: ignore[return-value]

    @property
    def adjusted(self) -> bool:
        """Whether a gate or an exact start stands between the numbers and the update."""
        return "gate" in self._buffers or "start" in self._modules

    # --- what a method writes -------------------------------------------------------------------
    def low_rank(self) -> Factors | None:
        """A (r, in) and B (out, r) with ΔW = scale · B A, or None: there are no such factors."""
        return None

    def delta(self, w0: Tensor) -> Tensor:
        """ΔW, shape (out, in)."""
        pair = self.low_rank()
        if pair is not None:
            change: Tensor = self.scale * (pair[1] @ pair[0])
            return change
        return self.map_weight(w0) - w0

    def map_weight(self, w0: Tensor) -> Tensor:
        """W0 + ΔW, shape (out, in)."""
        return w0 + self.delta(w0)

    def map_bias(self, b0: Tensor) -> Tensor:
        """The adapted bias, shape (out,)."""
        return b0

    def sparse(self) -> tuple[Tensor, Tensor] | None:
        """Where ΔW is not zero, (K,) int64, rising, counted row by row, and the K values there; or
        None: it is dense. Such an update is merged and taken back by writing K numbers."""
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
        """ΔW x for x (..., in), in the precision of the trained numbers."""
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
        """The groups of numbers of this kind ("rank", "term", ...) that can be switched off."""
        return []

    def start_from(self, gradient: Tensor) -> None:
        """Choose or draw what training begins with, from ∂L/∂W0 (out, in). Raises StateError where
        the method does not look at it (`Structure.wants_gradient`)."""
        raise StateError(f"{type(self).__name__} does not start from gradients")

    def diagnostics(self) -> dict[str, float]:
        """Numbers worth logging about the health of this update."""
        return {}

    def compact(self) -> "tuple[Delta, dict[str, Any]] | None":
        """This update without what was switched off, and the plan's choices for it; None where
        only a LoRA of lower rank can say it."""
        return None

    # --- what the machinery reads ---------------------------------------------------------------
    def base_weight(self) -> Tensor:
        """W0 in the precision of the trained numbers, detached."""
        weight = self.site.weight().detach()
        parameter = next(iter(self.trained_parameters()), weight)
        return weight.to(torch.promote_types(parameter.dtype, torch.float32))

    def factors(self) -> Factors | None:
        """`low_rank` with gate and exact start applied: what the layer multiplies by."""
        pair = self.low_rank()
        return None if pair is None else self.complete(pair)

    def complete(self, pair: Factors) -> Factors:
        """Apply gate and exact start to factors that are already formed."""
        A, B = pair
        gate = self._buffers.get("gate")
        if gate is not None:
            A = gate[:, None] * A
        if self.origin is not None and (start := self.origin.low_rank()) is not None:
            A0, B0 = (t.detach() for t in start)
            A, B = torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
        return A, B

    def dense(self, w0: Tensor) -> Tensor:
        """ΔW (out, in) with gate and exact start applied."""
        pair = self.factors()
        if pair is not None:
            return self.scale * (pair[1] @ pair[0])
        change = self.delta(w0)
        return change if self.origin is None else change - self.origin.delta(w0).detach()

    def bias_change(self) -> Tensor | None:
        """b − b0, shape (out,), or None when the bias stays."""
        b0 = self.site.bias() if "map_bias" in self.written else None
        if b0 is None:
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
            w0 = self.base_weight() if self.reads_base else self._blank()
            return LowRank.from_dense(self.dense(w0).detach(), rank, energy)
        exact = LowRank(pair[0].detach(), pair[1].detach() * self.scale)
        return exact if rank is None and energy is None else exact.squeeze(rank, energy)

    def _blank(self) -> Tensor:
        """What has the shape of W0 and no memory."""
        shape = self.site.shape
        zero = torch.zeros((), device=self.site.device)
        return zero.expand(shape.out_features, shape.in_features)

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """The trained numbers of this site (the exact start's frozen copy is not among them)."""
        return (p for name, p in self.named_parameters() if not name.startswith("start."))

    # --- exact start, gates, masks --------------------------------------------------------------
    def keep_start(self) -> None:
        """Freeze today's numbers as the point that equals the base: from now on the update is
        ΔW(θ) − ΔW(θ0), exactly zero now and without cancellation for factors,
        A' = [A; A − A0], B' = [B − B0, B0]. Raises StateError when a start is kept already."""
        if "start" in self._modules:
            raise StateError(f"{self.site.shape.name} already keeps an exact start")
        memo: dict[int, Any] = {id(self.site): self.site}
        if self.bank is not None:
            memo[id(self.bank)] = self.bank.keep_start()
        self.start = copy.deepcopy(self, memo).requires_grad_(False)

    def set_gate(self, gate: Tensor) -> None:
        """Multiply row i of A by gate[i]; `gate` (r,) is stored with the adapter. Raises StateError
        where the update has no factors."""
        if "low_rank" not in self.written:
            raise StateError(f"{type(self).__name__} has no factors: there are no ranks to gate")
        self.register_buffer("gate", gate.detach().clone())

    def switch_off(self, group: Group) -> None:
        """Set the group's numbers to zero and mark them dead: the driver keeps their gradient,
        optimiser state and decay at zero, shapes and identity stay."""
        with torch.no_grad():
            for name, index in group.slices:
                parameter = self.get_parameter(name)
                mask = self._buffers.get(f"alive_{name}")
                if mask is None:
                    mask = torch.ones_like(parameter, dtype=torch.bool)
                    self.register_buffer(f"alive_{name}", mask)
                mask[index] = False
                parameter[index] = 0

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> boolean tensor, True where a number is alive."""
        prefix = "alive_"
        return {
            n.removeprefix(prefix): b
            for n, b in self._buffers.items()
            if n.startswith(prefix) and b is not None
        }

    @property
    def silent(self) -> bool:
        """Whether every number is switched off."""
        masks = self.masks()
        return bool(masks) and not any(bool(mask.any()) for mask in masks.values())

    def live(self, kind: str) -> list[Group]:
        """The groups of this kind that have not been switched off."""
        masks = self.masks()

        def alive(group: Group) -> bool:
            return all(
                name not in masks or bool(masks[name][at].any()) for name, at in group.slices
            )

        return [group for group in self.groups(kind) if alive(group)]

    # --- nn.Module behaviour --------------------------------------------------------------------
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and (name == "gate" or name.startswith("alive_")):
                self.register_buffer(name, torch.empty_like(value, device=self.site.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Bypass(Delta):
    """h ← F(h) + ΔW h around a block F, not inside a weight; never mergeable (LoR2C's kind)."""

    mergeable: ClassVar[bool] = False
