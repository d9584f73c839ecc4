"""The terms of BA-LoRA: functions of logits Z (rows, classes), in float32 at least."""

import torch
import torch.nn.functional as F
from torch import Tensor

from finespun.linalg import randomized_svd_of

EXACT = 4096  # classes, up to which singular values are exact


def consistency(Z: Tensor, base: Tensor, temperature: float) -> Tensor:
    """T² · mean KL(softmax(base / T) ‖ softmax(Z / T))."""
    p, q = (F.log_softmax(t / temperature, dim=-1) for t in (base, Z))
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


def distance(Z: Tensor, base: Tensor) -> Tensor:
    """The mean square of Z / ‖Z‖ − base / ‖base‖, row by row; the form of 2024 for classes."""
    return (F.normalize(Z, dim=-1) - F.normalize(base, dim=-1)).square().mean()


def correlation(Z: Tensor) -> Tensor:
    """Σ_{i≠j} C_ij² / D, C the covariance of the columns over the rows."""
    centred = Z - Z.mean(0)
    C = centred.mT @ centred / (len(Z) - 1)
    return (C.square().sum() - C.diagonal().square().sum()) / Z.shape[1]


def negative_entropy(Z: Tensor, top: int | None) -> Tensor:
    """−mean entropy of the `top` largest logits of each row, normalised among themselves."""
    kept = Z if top is None or top >= Z.shape[1] else Z.topk(top, dim=-1).values
    log_p = F.log_softmax(kept, dim=-1)
    return (log_p.exp() * log_p).sum(-1).mean()


def concentration(Z: Tensor, k: int, by_norm: bool, generator: torch.Generator) -> Tensor:
    """−Σ_{i≤k} s_i over Σ_j s_j, or over ‖Z‖_F with `by_norm`; s the singular values of Z.

    Σ_{i≤k} s_i = tr(Uᵀ Z V) with the singular vectors held constant, so that no gradient goes
    through a decomposition; these are drawn at random where Z has more than 4,096 classes.
    """
    k = min(k, *Z.shape)
    if not by_norm:
        s = torch.linalg.svdvals(Z)
        return -s[:k].sum() / s.sum().clamp_min(1e-12)
    with torch.no_grad():
        if Z.shape[1] <= EXACT:
            U, _, Vh = torch.linalg.svd(Z, full_matrices=False)
        else:
            seed = int(torch.randint(2**31, (), generator=generator))
            U, _, Vh = randomized_svd_of(Z, k, oversample=5, power=2, seed=seed)
    leading = ((U[:, :k].mT @ Z) * Vh[:k]).sum()
    return -leading / torch.linalg.matrix_norm(Z).clamp_min(1e-12)
