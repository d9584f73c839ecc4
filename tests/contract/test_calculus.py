"""push(v) = J v and pull(M) = Jᵀ M of every structure, in float64."""

import pytest
import torch
from suite import INNER, WIDTH, draw, every_structure, net, relative, stir, stirred

from finespun.contract import calculus
from finespun.errors import InputError
from finespun.linalg import LowRank

WIDE = torch.float64


def ready(case):
    """The case's delta in float64, away from its start, and a change of every trained parameter."""
    delta = case.delta(WIDE).double()
    if delta.bank is not None:
        delta.bank.double()
    own = [*delta.trained_parameters(), *(delta.bank.parameters() if delta.bank else ())]
    stir([p for p in own if p.requires_grad])
    v = {n: draw(*t.shape, seed=30 + i, dtype=WIDE) for i, (n, t) in enumerate(theta(delta))}
    return delta, v


def theta(delta):
    return calculus.parameters_of(delta).items()


def update(delta):
    """ΔW as a tensor, also for a bypass."""
    pair = delta.factors()
    return delta.dense(delta.base_weight()) if pair is None else delta.scale * (pair[1] @ pair[0])


def dense(matrix):
    return matrix.dense() if isinstance(matrix, LowRank) else matrix


def inner(a, b):
    return float(sum((a[k] * b[k]).sum() for k in a))


@every_structure()
def test_pull_is_the_adjoint_of_push(case):
    delta, v = ready(case)
    rows = WIDTH if case.block else INNER
    M = draw(rows, WIDTH, seed=4, dtype=WIDE)
    pushed = dense(calculus.push(delta, v))
    assert pushed.shape == (rows, WIDTH)
    expected = float((pushed * M).sum())
    assert inner(v, calculus.pull(delta, M)) == pytest.approx(expected, rel=1e-10)
    thin = LowRank(draw(3, WIDTH, seed=5, dtype=WIDE), draw(rows, 3, seed=6, dtype=WIDE))
    wanted = calculus.pull(delta, thin.dense())
    for name, value in calculus.pull(delta, thin).items():
        assert relative(value, wanted[name]) <= 1e-10


@every_structure()
def test_pull_is_the_gradient(case):
    delta, _ = ready(case)
    M = draw(WIDTH if case.block else INNER, WIDTH, seed=4, dtype=WIDE)
    own = {n: p for n, p in calculus._Caller(delta).named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((update(delta) * M).sum(), list(own.values()))
    pulled = calculus.pull(delta, M)
    assert set(pulled) == {n.removeprefix("delta.") for n in own}
    for name, gradient in zip(own, gradients):
        assert relative(pulled[name.removeprefix("delta.")], gradient) <= 1e-10


@every_structure(lambda case: not case.constant)
def test_push_is_the_finite_difference(case):
    delta, v = ready(case)
    step, sides = 1e-6, []
    own = {n.removeprefix("delta."): p for n, p in calculus._Caller(delta).named_parameters()}
    pushed = dense(calculus.push(delta, v))
    for sign in (1, -2):
        with torch.no_grad():
            for name, change in v.items():
                own[name].add_(sign * step * change)
            sides.append(update(delta).clone())
    assert relative((sides[0] - sides[1]) / (2 * step), pushed) <= 1e-6


@every_structure()
def test_a_change_may_leave_numbers_out_but_not_invent_them(case):
    delta, v = ready(case)
    name = next(iter(v))
    rest = {n: torch.zeros_like(t) for n, t in v.items() if n != name}
    one = dense(calculus.push(delta, {name: v[name]}))
    assert relative(one, dense(calculus.push(delta, {name: v[name], **rest}))) <= 1e-12
    with pytest.raises(InputError, match=rf"'{name}x'.*{name}"):
        calculus.push(delta, {f"{name}x": v[name]})


@every_structure()
def test_a_whole_adapter_sums_over_its_bank(case):
    model, adapter = stirred(case, net(WIDE))
    model.double()
    shapes = {n: d.site.shape for n, d in adapter.deltas.items()}
    M = {
        n: draw(s.out_features, s.in_features, seed=i, dtype=WIDE)
        for i, (n, s) in enumerate(shapes.items())
    }
    pulled = adapter.pull(M)
    v = {
        place: {k: draw(*t.shape, seed=70 + i, dtype=WIDE) for i, (k, t) in enumerate(own.items())}
        for place, own in pulled.items()
    }
    pushed = adapter.push(v)
    assert set(pushed) == set(M)
    expected = sum(float((dense(pushed[n]) * M[n]).sum()) for n in M)
    got = sum(inner(v[place], pulled[place]) for place in v)
    assert got == pytest.approx(expected, rel=1e-9)
