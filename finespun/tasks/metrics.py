"""Numbers that say how good predictions are, on plain tensors."""

import torch
from torch import Tensor

from finespun.errors import InputError


def accuracy(predicted: Tensor, expected: Tensor) -> float:
    """The share of rows where the two class numbers agree; both of shape (rows,)."""
    _check(predicted, expected)
    return (predicted == expected).double().mean().item()


def macro_f1(predicted: Tensor, expected: Tensor) -> float:
    """The plain mean over classes of F1 = 2 TP / (2 TP + FP + FN).

    A class counts if it occurs in either tensor; both of shape (rows,).
    """
    _check(predicted, expected)
    scores = []
    for kind in torch.unique(torch.cat([predicted, expected])):
        said, true = predicted == kind, expected == kind
        scores.append(2 * (said & true).sum().double() / (said.sum() + true.sum()))
    return float(torch.stack(scores).mean())


def mean_squared_error(predicted: Tensor, expected: Tensor) -> float:
    """mean((predicted - expected)^2), in float64."""
    _check(predicted, expected)
    return (predicted.double() - expected.double()).square().mean().item()


def pearson(predicted: Tensor, expected: Tensor) -> float:
    """The linear correlation, in [-1, 1]; NaN if either side is constant."""
    _check(predicted, expected)
    a, b = (t.double() - t.double().mean() for t in (predicted, expected))
    lengths = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    if lengths == 0:
        return float("nan")
    return float((a @ b / lengths).clamp(-1, 1))


def spearman(predicted: Tensor, expected: Tensor) -> float:
    """The correlation of ranks, ties sharing their mean rank; NaN if either side is constant."""
    _check(predicted, expected)
    return pearson(_ranks(predicted), _ranks(expected))


def evaluate(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics that fit: classification for logits (rows, classes), regression for (rows,).

    `labels`: (rows,) class numbers or values. Keys: accuracy and macro_f1, or mse, pearson and
    spearman.
    """
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        predicted = outputs.argmax(dim=1)
        return {"accuracy": accuracy(predicted, labels), "macro_f1": macro_f1(predicted, labels)}
    values = outputs.reshape(-1)
    return {
        "mse": mean_squared_error(values, labels),
        "pearson": pearson(values, labels),
        "spearman": spearman(values, labels),
    }


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, in float64; equal values share the mean of their ranks."""
    groups: Tensor
    counts: Tensor
    _, groups, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[groups]


def _check(predicted: Tensor, expected: Tensor) -> None:
    if predicted.shape != expected.shape or predicted.ndim != 1 or len(predicted) == 0:
        raise InputError(
            f"predicted {tuple(predicted.shape)} and expected {tuple(expected.shape)} "
            "must be two vectors of one length, at least 1"
        )
