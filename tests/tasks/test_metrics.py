"""Metrics against hand-worked cases."""

import math

import pytest
import torch

from finespun.errors import InputError
from finespun.tasks.metrics import (
    accuracy,
    evaluate,
    macro_f1,
    mean_squared_error,
    pearson,
    spearman,
)


def test_accuracy_and_macro_f1_by_hand() -> None:
    predicted, expected = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 0])
    assert accuracy(predicted, expected) == pytest.approx(3 / 5)
    # F1 of the classes: 0: 2/(2+1+1), 1: 2/(2+0+1), 2: 2/(2+1+0)
    assert macro_f1(predicted, expected) == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3, abs=1e-12)


def test_a_class_never_predicted_counts_as_zero() -> None:
    assert macro_f1(torch.tensor([0, 0]), torch.tensor([0, 1])) == pytest.approx((2 / 3 + 0) / 2)


def test_mean_squared_error_by_hand() -> None:
    assert mean_squared_error(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0])) == 2.0


def test_pearson_sees_lines_and_spearman_sees_order() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pearson(x, 3 * x - 7) == pytest.approx(1)
    assert pearson(x, -x) == pytest.approx(-1)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert pearson(x, x.exp()) < 0.95


def test_spearman_shares_the_mean_rank_of_ties() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    value = spearman(torch.tensor([1.0, 5.0, 5.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert value == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_correlation_with_a_constant_is_nan() -> None:
    assert math.isnan(pearson(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])))


def test_evaluate_picks_what_fits() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert evaluate(logits, torch.tensor([0, 1])) == {"accuracy": 1.0, "macro_f1": 1.0}
    values = torch.tensor([[1.0], [2.0], [4.0]])
    assert set(evaluate(values, torch.tensor([1.0, 2.0, 3.0]))) == {"mse", "pearson", "spearman"}


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((0,), (0,)), ((2, 1), (2, 1))])
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InputError, match="vectors of one length"):
        mean_squared_error(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
