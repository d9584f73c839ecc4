"""Parameters in groups for an optimiser: who decays, and whose learning rate is another."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from finespun.contract import ParamGroup
from finespun.errors import InputError

MOST_DECAYING_LR = 1e-2


def param_groups(
    parameters: Sequence[nn.Parameter],
    wishes: Sequence[ParamGroup] = (),
    lr: float = 1e-3,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser: matrices decay, vectors (biases, norms, magnitudes) do not.

    A parameter that wishes name has lr · the product of their factors, kept as "lr_factor" in the
    group for schedules, and decays only where all of them say so; one whose factor is 0 is frozen
    and left out. A matrix loses at most the share `MOST_DECAYING_LR` · weight_decay of itself in a
    step: AdamW takes lr · weight_decay, which at the large learning rates of some structures (1 for
    C3A) would undo what they learn. Raises InputError when there is nothing to train.
    """
    factor: dict[int, float] = {}
    decays: dict[int, bool] = {}
    known = {id(p): p for p in parameters}
    for wish in wishes:
        if not wish.lr_factor >= 0:
            raise InputError(f"lr_factor={wish.lr_factor} must be 0 or positive; try 1.0")
        for parameter in wish.parameters:
            key = id(parameter)
            known.setdefault(key, parameter)
            factor[key] = factor.get(key, 1.0) * wish.lr_factor
            decays[key] = decays.get(key, True) and wish.decay
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for key, parameter in known.items():
        if factor.get(key) == 0.0:
            parameter.requires_grad_(False)
            continue
        decay = parameter.ndim > 1 and decays.get(key, True)
        found.setdefault((factor.get(key, 1.0), decay), []).append(parameter)
    if not found:
        raise InputError("nothing to train: there are no parameters, and no module is trained")
    return [
        {
            "params": found[at],
            "weight_decay": weight_decay * min(1.0, MOST_DECAYING_LR / (lr * at[0])) * at[1],
            **_rate(at[0], lr),
        }
        for at in sorted(found, key=lambda at: (at[0] != 1.0, at[0], not at[1]))
    ]


def adamw(groups: Sequence[dict[str, Any]], lr: float) -> torch.optim.AdamW:
    """AdamW on groups of `param_groups`, fused where the devices allow it."""
    fused = all(p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
    return torch.optim.AdamW(list(groups), lr=lr, fused=fused)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """The run's learning rate from now on; each group's is its "lr_factor" times that."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def _rate(factor: float, lr: float) -> dict[str, float]:
    return {} if factor == 1.0 else {"lr": lr * factor, "lr_factor": factor}
