"""BA-LoRA's terms and GLAD's rules, in float64."""

import math

import pytest
import torch

from finespun.methods.objectives import BALoRA
from finespun.methods.objectives.glad import STEER, dot, norm
from finespun.methods.objectives.pieces.outputs import (
    concentration,
    consistency,
    correlation,
    distance,
    negative_entropy,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def generator():
    return torch.Generator().manual_seed(0)


def test_the_base_itself_is_consistent():
    Z = draw(8, 5).requires_grad_()
    for term in (consistency(Z, Z.detach(), 2.0), distance(Z, Z.detach())):
        assert abs(float(term.detach())) < 1e-12
        assert torch.autograd.grad(term, Z)[0].abs().max() < 1e-7
    assert consistency(Z, draw(8, 5, seed=1), 2.0) > 0
    wanted = 4 * sum(
        (p * (p / q).log()).sum()
        for p, q in zip((draw(8, 5, seed=1) / 2).softmax(1), (Z / 2).softmax(1))
    )
    assert float(consistency(Z, draw(8, 5, seed=1), 2.0)) == pytest.approx(float(wanted) / 8)


def test_correlation_counts_pairs_of_columns():
    rho, v, rows = 0.6, 4.0, 400
    basis = torch.linalg.qr(torch.cat([torch.ones(rows, 1).double(), draw(rows, 3)], 1))[0][:, 1:]
    basis = basis * math.sqrt(rows - 1)
    assert float(correlation(basis)) < 1e-20
    pair = basis[:, [0, 1, 2]].clone()
    pair[:, 1] = rho * basis[:, 0] + math.sqrt(1 - rho**2) * basis[:, 1]
    assert float(correlation(pair * math.sqrt(v))) == pytest.approx(2 * rho**2 * v**2 / 3)


def test_the_share_of_the_first_directions():
    low = draw(9, 3) @ draw(3, 7, seed=1)
    assert float(concentration(low, 3, False, generator())) == pytest.approx(-1)
    eye = torch.eye(6).double()
    assert float(concentration(eye, 2, False, generator())) == pytest.approx(-2 / 6)
    one = draw(9, 1) @ draw(1, 7, seed=1)
    assert float(concentration(one, 3, True, generator())) == pytest.approx(-1)
    assert float(concentration(draw(9, 7), 3, True, generator())) >= -math.sqrt(3)


def test_the_gradient_of_the_leading_directions_is_true():
    Z = draw(9, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: concentration(z, 3, True, generator()), Z)
    assert torch.autograd.gradcheck(lambda z: concentration(z, 3, False, generator()), Z)


def test_drawn_directions_are_near_the_exact_ones():
    U, V = torch.linalg.qr(draw(64, 64))[0], torch.linalg.qr(draw(5000, 64, seed=1))[0]
    s = 0.8 ** torch.arange(64).double()
    Z = U * s @ V.T
    wanted = -s[:10].sum() / s.norm()
    assert float(concentration(Z, 10, True, generator())) == pytest.approx(float(wanted), rel=1e-2)


def test_entropy_of_the_largest():
    assert float(negative_entropy(draw(5, 40), 1)) == 0
    assert float(negative_entropy(torch.zeros(5, 40), 20)) == pytest.approx(-math.log(20))
    assert float(negative_entropy(torch.zeros(5, 40), None)) == pytest.approx(-math.log(40))


def test_weights_follow_the_run():
    form = BALoRA(consistency=1.0, diversity=1.0, spectrum=2.0)
    assert form.weights(True, 0.0) == (1.0, 0.0, 0.0)
    assert form.weights(True, 1.0)[0] == pytest.approx(0.1)
    assert form.weights(True, 0.199)[1:] == (0.0, 0.0)
    assert form.weights(True, 0.225)[1:] == pytest.approx((0.5, 1.0))
    assert form.weights(True, 0.25)[1:] == pytest.approx((1.0, 2.0))
    assert form.weights(False, 0.0) == (1.0, 1.0, 2.0)


@pytest.mark.parametrize("lam", [0.25, 1.0])
def test_rules_of_steering(lam):
    for seed in range(8):
        g, s = (
            [draw(4, 3, seed=seed), draw(5, seed=seed + 50)],
            [draw(4, 3, seed=seed + 90), draw(5, seed=9)],
        )
        turned = [a - b for a, b in zip(STEER["orth"](g, s, lam), g)]
        assert abs(dot(turned, g)) < 1e-8
        assert norm(STEER["bisect"](g, s, lam)) == pytest.approx(norm(g))
        assert dot(STEER["project"](g, s, lam), s) >= -1e-8
        for a, b, c in zip(STEER["blend"](g, s, lam), g, s):
            torch.testing.assert_close(a, (1 - lam) * b + lam * c)
