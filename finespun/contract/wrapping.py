"""What stands around any update: exact start, gate and death, and how they are kept.

ΔW = scale · Σ_i g_i (B_i A_i − B0_i A0_i)
"""

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from finespun.contract.bank import Bank, Precise
from finespun.contract.groups import Group
from finespun.contract.roles import DEAD, GATE, MASK, START, role_of
from finespun.contract.site import Site
from finespun.errors import StateError

Factors = tuple[Tensor, Tensor]


class Wrapped(Precise):
    """The trained parameters of one site and what is kept beside them: a frozen start, a gate,
    masks of what is switched off."""

    written: ClassVar[frozenset[str]] = frozenset()
    reads_base: ClassVar[bool] = True
    scale: float = 1.0

    site: Site
    bank: Bank | None

    def __init__(self, site: Site, bank: Bank | None = None) -> None:
        super().__init__()
        self.refer(site, bank)

    def refer(self, site: Site, bank: Bank | None) -> None:
        """Point at the site and the bank without registering them as children."""
        self.__dict__["site"] = site
        self.__dict__["bank"] = bank

    @property
    def origin(self) -> Self | None:
        """The frozen copy that `keep_start` made."""
        return self._modules.get("start")  # type: ignore[return-value]

    @property
    def adjusted(self) -> bool:
        """Whether a gate, an exact start or death stands between the parameters and the update."""
        return START in self._modules or self.gating is not None or self.dead

    @property
    def gating(self) -> Tensor | None:
        """g (r,), what the terms of the product are multiplied by; None where nothing does."""
        trained = self._parameters.get(GATE)
        return self._buffers.get(GATE) if trained is None else trained

    @property
    def dead(self) -> bool:
        """Whether the whole update is switched off. Layers do not call it then, whatever its
        parameters are; it answers ΔW = 0 and keeps its bias."""
        return DEAD in self._buffers

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

    def base_weight(self) -> Tensor:
        """W0 in the precision of the trained parameters, detached."""
        weight = self.site.weight().detach()
        parameter = next(iter(self.trained_parameters()), weight)
        return weight.to(torch.promote_types(parameter.dtype, torch.float32))

    def factors(self) -> Factors | None:
        """`low_rank` with gate and exact start applied: what the layer multiplies by."""
        pair = self.low_rank()
        return None if pair is None else self.complete(pair)

    def complete(self, pair: Factors) -> Factors:
        """Apply exact start, gate and death to factors that are already formed."""
        A, B = pair
        if self.dead:
            return torch.zeros_like(A), torch.zeros_like(B)
        gate = self.gating
        if self.origin is not None and (start := self.origin.low_rank()) is not None:
            A0, B0 = (t.detach() for t in start)
            A, B = torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
            gate = None if gate is None else gate.repeat(2)
        return A if gate is None else gate[:, None] * A, B

    def dense(self, w0: Tensor) -> Tensor:
        """ΔW (out, in) with gate and exact start applied."""
        pair = self.factors()
        if pair is not None:
            return self.scale * (pair[1] @ pair[0])
        if self.dead:
            return torch.zeros_like(w0)
        change = self.delta(w0)
        return change if self.origin is None else change - self.origin.delta(w0).detach()

    def blank(self) -> Tensor:
        """What has the shape of W0 and no memory."""
        shape = self.site.shape
        zero = torch.zeros((), device=self.site.device)
        return zero.expand(shape.out_features, shape.in_features)

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """The trained parameters of this site (the exact start's frozen copy is not among them)."""
        return (p for name, p in self.named_parameters() if role_of(name)[0] != "start")

    def keep_start(self) -> None:
        """Freeze today's parameters as the point that equals the base: from now on the update is
        ΔW(θ) − ΔW(θ0), exactly zero now and without cancellation for factors,
        A' = [A; A − A0], B' = [B − B0, B0]. Raises StateError when a start is kept already."""
        if START in self._modules:
            raise StateError(f"{self.site.shape.name} already keeps an exact start")
        memo: dict[int, Any] = {id(self.site): self.site}
        if self.bank is not None:
            memo[id(self.bank)] = self.bank.keep_start()
        start = copy.deepcopy(self, memo).requires_grad_(False)
        for name in [n for n in start.state_dict() if _stands_between(n)]:
            delattr(start, name)
        self.add_module(START, start)

    def set_gate(self, gate: Tensor, trained: bool = False) -> None:
        """Multiply term i of ΔW = scale · Σ_i B_i A_i, whose start is taken away already, by
        gate[i]; `gate` (r,) is stored with the adapter, and a number of its own where `trained`.
        Raises StateError where the update has no factors."""
        if "low_rank" not in self.written:
            raise StateError(f"{type(self).__name__} has no factors: there are no ranks to gate")
        if self.gating is not None:
            delattr(self, GATE)
        own = gate.detach().clone()
        if trained:
            self.register_parameter(GATE, nn.Parameter(own))
        else:
            self.register_buffer(GATE, own)

    def switch_off(self, group: Group) -> None:
        """Set the group's parameters to zero. The whole update (a "module" group) is dead from now
        on: the layer stops calling it, whatever its parameters become. A part is one whose
        parameters at zero have no output: they are zero in an exact start too and masked, and the
        driver keeps their gradient, optimiser state and decay at zero; shapes and identity stay."""
        if group.kind == "module":
            with torch.no_grad():
                for parameter in self.trained_parameters():
                    parameter.zero_()
            device = self.site.device
            self.register_buffer(DEAD, torch.zeros((), dtype=torch.bool, device=device))
            return
        with torch.no_grad():
            for name, index in group.slices:
                parameter = self.get_parameter(name)
                mask = self._buffers.get(f"{MASK}{name}")
                if mask is None:
                    mask = torch.ones_like(parameter, dtype=torch.bool)
                    self.register_buffer(f"{MASK}{name}", mask)
                mask[index] = False
                parameter[index] = 0
                if self.origin is not None:
                    self.origin.get_parameter(name)[index] = 0

    def switch_on(self) -> None:
        """Take back that the update or parts of it are dead; parameters stay as they are."""
        for name in [n for n in self._buffers if role_of(n)[0] in ("mask", "dead")]:
            delattr(self, name)

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> boolean tensor, True where a number is alive."""
        named = [(role_of(n), b) for n, b in self._buffers.items() if b is not None]
        return {name: mask for (role, name), mask in named if role == "mask"}

    @property
    def silent(self) -> bool:
        """Whether it is dead, or every parameter that has a mask is switched off."""
        masks = self.masks()
        return self.dead or (bool(masks) and not any(bool(m.any()) for m in masks.values()))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        extra = [k for k in state_dict if k.startswith(prefix) and _stands_between(k, prefix)]
        for key in extra:
            name, value = key.removeprefix(prefix), state_dict[key]
            if prefix.endswith(f"{START}."):
                del state_dict[key]  # a start of 0.1 may hold what no longer acts on it
            elif name not in self._parameters and name not in self._buffers:
                self.register_buffer(name, torch.empty_like(value, device=self.site.device))
        if f"{prefix}{DEAD}" not in extra:
            self._buffers.pop(DEAD, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _stands_between(key: str, prefix: str = "") -> bool:
    """Whether a tensor is a gate, a mask or the mark of a dead update."""
    return role_of(key.removeprefix(prefix))[0] in ("gate", "mask", "dead")
