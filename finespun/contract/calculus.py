"""The derivative of an update: J v and Jᵀ M for any structure, through its own factors.

With θ a delta's trained parameters (its bank's included) and J = ∂ΔW/∂θ, `push` gives J v, the
first change of ΔW for a change v of θ, and `pull` gives Jᵀ M, the gradient at θ for a gradient M at
ΔW. Where there are factors, ΔW = c·B·A:  J v = c (B dA + dB A)  and  Jᵀ M  starts from
dA = c Bᵀ M, dB = c M Aᵀ, so that nothing of size out x in is formed.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from finespun.contract.wrapping import Wrapped
from finespun.errors import InputError, nearest
from finespun.linalg import LowRank

Numbers = Mapping[str, Tensor]


class Multiplies(Protocol):
    """Anything of shape (out, in) that multiplies tensors from both sides."""

    def __matmul__(self, other: Tensor) -> Tensor: ...
    def __rmatmul__(self, other: Tensor) -> Tensor: ...


class _Caller(nn.Module):
    """Delta and bank under one roof, so that torch.func can replace the parameters of both."""

    def __init__(self, delta: Wrapped) -> None:
        super().__init__()
        self.delta = delta
        if delta.bank is not None:
            self.bank = delta.bank

    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self.delta, method)(*args)


def parameters_of(delta: Wrapped) -> dict[str, Tensor]:
    """θ by name: the delta's own trained parameters, and its bank's as bank.NAME."""
    own = {n: p for n, p in _Caller(delta).named_parameters() if ".start." not in f".{n}"}
    return {n.removeprefix("delta."): p.detach() for n, p in own.items()}


def push(delta: Wrapped, v: Numbers) -> LowRank | Tensor:
    """J v: a LowRank of rank 2r where the method has factors, else a tensor (out, in).

    `v` maps names of `parameters_of(delta)` to tensors of their shapes; a missing name counts as
    zero.
    """
    theta = parameters_of(delta)
    for name in v:
        if name not in theta:
            raise InputError(f"no trained parameter is called {name!r}; {nearest(name, theta)}")
    tangent = {n: v.get(n, torch.zeros_like(t)) for n, t in theta.items()}
    if delta.factors() is not None:
        moved = jvp(lambda t: called(delta, t, "factors"), (theta,), (tangent,))
        (A, B), (dA, dB) = moved[:2]
        return LowRank(torch.cat([A, dA]), torch.cat([dB, B], dim=1) * delta.scale)
    w0 = delta.base_weight()
    change: Tensor = jvp(lambda t: called(delta, t, "dense", w0), (theta,), (tangent,))[1]
    return change


def pull(delta: Wrapped, M: "Multiplies | LowRank | Tensor") -> dict[str, Tensor]:
    """Jᵀ M for M (out, in): a tensor for every name of `parameters_of(delta)`."""
    theta = parameters_of(delta)
    if delta.factors() is not None:
        (A, B), back = vjp(lambda t: called(delta, t, "factors"), theta)[:2]
        pair = ((B.mT @ M) * delta.scale, (M @ A.mT) * delta.scale)
        found: dict[str, Tensor] = back(pair)[0]
        return found
    w0 = delta.base_weight()
    dense = (
        M.dense()
        if isinstance(M, LowRank)
        else M @ torch.eye(w0.shape[1], dtype=w0.dtype, device=w0.device)
    )
    return vjp(lambda t: called(delta, t, "dense", w0), theta)[1](dense)[0]


def called(delta: Wrapped, theta: Numbers, method: str, *args: Any) -> Any:
    """A method of the delta with `theta` in place of its trained parameters and its bank's."""
    named = {n if n.startswith("bank.") else f"delta.{n}": t for n, t in theta.items()}
    return functional_call(_Caller(delta), named, (method, *args))
