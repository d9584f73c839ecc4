"""Muon on factors: momentum, made as orthogonal as five iterations make it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from finespun.contract import AdapterView, Dynamics, Need, TrainingHooks, register
from finespun.contract.structure import must_be_one_of
from finespun.errors import InputError
from finespun.methods.dynamics.pieces.apart import Apart, Groups

Size = Literal["rms", "original"]
STEPS, (A, B, C) = 5, (3.4445, -4.7750, 2.0315)


@register
@dataclass(frozen=True, kw_only=True)
class Muon(Dynamics):
    """M ← β M + (1 − β) g;  p ← p (1 − lr·wd) − lr·c·orth(β M + (1 − β) g).

    Good for: steps of one size in all directions of a factor; one buffer of state.
    Not for: tiny gradients, which move a factor as far as large ones.

    orth: X = U / ‖U‖, five times X ← a X + (b K + c K²) X, K = X Xᵀ. A factor of more than two
    dimensions is a matrix (terms, parameters). size="rms": c = 0.2 √max(rows, columns), so that lr
    means AdamW's; "original": √max(1, rows / columns). What is no matrix of the update (heads,
    gates, magnitudes) is AdamW's.
    """

    momentum: float = 0.95
    size: Size = "rms"

    kind = "muon"
    source = "KellerJordan/Muon"

    def __post_init__(self) -> None:
        must_be_one_of("size", self.size, get_args(Size))
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum={self.momentum} must be in [0, 1); try 0.95")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.STEPPER})

    def hooks(self) -> TrainingHooks:
        return TrainingHooks()

    def optimizer(
        self, adapter: AdapterView, groups: list[dict[str, Any]], lr: float
    ) -> "MuonBeside":
        bank = [] if adapter.bank is None else list(adapter.bank.parameters())
        own = [p for d in adapter.deltas.values() for p in d.trained_parameters()]
        return MuonBeside(groups, lr, [p for p in (*own, *bank) if p.ndim > 1], self)


class MuonBeside(Apart):
    """Muon for matrices of the update, AdamW for the rest."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, matrices: list[nn.Parameter], form: Muon
    ) -> None:
        super().__init__(groups, lr)
        self.matrices, self.form = matrices, form

    def move(self, groups: Groups) -> Iterable[nn.Parameter]:
        beta = self.form.momentum
        shapes: dict[object, list[nn.Parameter]] = {}
        for p in self.matrices:
            if p.grad is not None and p in groups:
                shapes.setdefault((p.shape, p.dtype, p.device), []).append(p)
        for members in shapes.values():
            wanted = []
            for p in members:
                self.state[p].setdefault("step", torch.zeros(()))  # AdamW reads it when it loads
                M = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                M.lerp_(p.grad, 1 - beta)
                wanted.append((M * beta).add_(p.grad, alpha=1 - beta).flatten(1))
            U = orthogonal(torch.stack(wanted)) * self._factor(wanted[0])
            for p, u in zip(members, U):
                lr = float(groups[p]["lr"])
                p.mul_(1 - lr * groups[p]["weight_decay"]).sub_(u.view_as(p), alpha=lr)
            yield from members

    def _factor(self, matrix: Tensor) -> float:
        rows, columns = matrix.shape
        if self.form.size == "rms":
            return float(0.2 * max(rows, columns) ** 0.5)
        return float(max(1.0, rows / columns) ** 0.5)


def orthogonal(U: Tensor) -> Tensor:
    """Near orthogonal matrices (b, m, n) with the singular directions of U; zero stays zero. The
    iteration runs on K alone, short side by short side: X_t = Q X_0, Q ← P Q, K ← P K P."""
    tall = U.shape[-2] > U.shape[-1]
    dtype = torch.promote_types(U.dtype, torch.float32)
    X = (U.mT if tall else U).to(dtype)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    eye = torch.eye(X.shape[-2], dtype=dtype, device=U.device)
    K, Q = X @ X.mT, eye
    for _ in range(STEPS):
        P = A * eye + B * K + C * K @ K
        Q, K = P @ Q, P @ K @ P
    X = Q @ X
    return (X.mT if tall else X).to(U.dtype)
