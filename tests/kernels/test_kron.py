"""Identities of the Kronecker kernels: every path equals Σ_k torch.kron, and counts are exact."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from finespun.errors import InputError
from finespun.kernels.kron import (
    form_macs,
    kron_apply,
    kron_macs,
    kron_rearrange,
    kron_restore,
    kron_sum,
    kron_sum3,
    kron_sum_many,
)

small = st.integers(1, 5)
sizes = st.tuples(small, small, small, small, small)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(S, a, b, i, j, seed=0):
    return draw(S, a, i, seed=seed), draw(S, b, j, seed=seed + 1)


def by_definition(*terms):
    total = 0
    for group in zip(*terms):
        product = group[0]
        for factor in group[1:]:
            product = torch.kron(product, factor)
        total = total + product
    return total


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@given(sizes, st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_formed_and_factorised_equal_the_definition(shape, tokens):
    _, a, b, i, j = shape
    P, Q = factors(*shape)
    M = by_definition(P, Q)
    assert relative(kron_sum(P, Q), M) <= 1e-12
    x = draw(tokens, 2, i * j, seed=7)
    for order in ("first", "second", None):
        y = kron_apply(P, Q, x, order)
        assert y.shape == (tokens, 2, a * b)
        torch.testing.assert_close(y, x @ M.T, rtol=1e-12, atol=1e-12)
    assert kron_apply(P, Q, x[:, 0].sum(0)).shape == (a * b,)


def test_index_rule_is_row_major():
    P, Q = factors(3, 2, 4, 5, 3)
    M = kron_sum(P, Q)
    for α, β, ι, κ in itertools.product(range(2), range(4), range(5), range(3)):
        wanted = (P[:, α, ι] * Q[:, β, κ]).sum()
        assert M[α * 4 + β, ι * 3 + κ] == pytest.approx(wanted.item(), rel=1e-12)


@given(sizes)
@settings(max_examples=40, deadline=None)
def test_rearrangement_is_an_isometry_and_its_own_inverse_pair(shape):
    layers, a, b, i, j = shape
    M = draw(layers, a * b, i * j)
    R = kron_rearrange(M, a, b, i, j)
    assert R.shape == (layers, a * i, b * j)
    assert torch.equal(kron_restore(R, a, b, i, j), M)
    assert R.norm().item() == pytest.approx(M.norm().item(), rel=1e-14)
    P, Q = factors(2, a, b, i, j)
    F1, F2 = P.flatten(1), Q.flatten(1)
    torch.testing.assert_close(kron_rearrange(kron_sum(P, Q), a, b, i, j), F1.T @ F2)


@given(sizes, st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_stacked_layers_equal_layers_one_by_one(shape, layers):
    S, a, b, i, j = shape
    P, Q = draw(layers, S, a, i), draw(layers, S, b, j, seed=1)
    stacked = kron_sum(P, Q)
    for layer in range(layers):
        torch.testing.assert_close(stacked[layer], by_definition(P[layer], Q[layer]))


@given(sizes, small, small)
@settings(max_examples=40, deadline=None)
def test_three_factors_equal_the_definition(shape, c, l):
    P, Q = factors(*shape)
    T = draw(shape[0], c, l, seed=5)
    torch.testing.assert_close(kron_sum3(P, Q, T), by_definition(P, Q, T))
    both = kron_sum3(*(torch.stack([f, 2 * f]) for f in (P, Q, T)))
    torch.testing.assert_close(both[1], 8 * both[0])


def test_many_forms_each_pair_in_its_place_with_its_own_gradient():
    shapes = [(3, 2, 2, 4, 3), (3, 2, 2, 4, 3), (2, 1, 4, 4, 3), (3, 2, 2, 4, 3)]
    pairs = [factors(*shape, seed=10 * n) for n, shape in enumerate(shapes)]
    pairs = [(P.requires_grad_(), Q.requires_grad_()) for P, Q in pairs]
    formed = kron_sum_many(pairs)
    for (P, Q), M in zip(pairs, formed):
        torch.testing.assert_close(M, by_definition(P, Q))
    formed[1].square().sum().backward()
    wanted = torch.autograd.grad(by_definition(*pairs[1]).square().sum(), pairs[1])
    torch.testing.assert_close((pairs[1][0].grad, pairs[1][1].grad), wanted)
    for n in (0, 3):
        assert pairs[n][0].grad is None or pairs[n][0].grad.count_nonzero() == 0
    assert pairs[2][0].grad is None
    assert kron_sum_many([]) == []


def test_many_uses_one_product_a_group():
    pairs = [factors(3, 2, 2, 4, 3, seed=n) for n in range(6)]
    pairs += [factors(2, 1, 4, 4, 3, seed=n) for n in range(5)]
    with torch.profiler.profile() as profile:
        kron_sum_many(pairs)
    products = [e for e in profile.events() if e.name in ("aten::mm", "aten::bmm")]
    assert len(products) == 2


@pytest.mark.parametrize("order", ["first", "second"])
def test_gradients_against_finite_differences(order):
    P, Q = (f.requires_grad_() for f in factors(2, 2, 3, 3, 2))
    T, x = draw(2, 2, 2, seed=3).requires_grad_(), draw(3, 6, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(kron_sum, (P, Q))
    assert torch.autograd.gradcheck(kron_sum3, (P, Q, T))
    assert torch.autograd.gradcheck(lambda *t: kron_apply(*t, order), (P, Q, x))


def test_backward_formulas_of_a_whole_lsr_layer():
    """With H = Σ B1ᵀ·G·B2: dB1 = G·B2·Zᵀ, dB2 = Gᵀ·B1·Z, dA1 = H·A2·Xᵀ, dA2 = Hᵀ·A1·X, dX alike."""
    S, r1, r2, p1, p2, q1, q2 = 3, 2, 3, 4, 5, 6, 2
    A1, A2 = factors(S, r1, r2, p1, p2)
    B1, B2 = factors(S, q1, q2, r1, r2, seed=5)
    x, g = draw(p1 * p2, seed=8), draw(q1 * q2, seed=9)
    leaves = [t.requires_grad_() for t in (A1, A2, B1, B2, x)]
    z = kron_apply(A1, A2, x)
    grads = torch.autograd.grad(kron_apply(B1, B2, z), leaves, g)
    X, Z, G = x.view(p1, p2), z.view(r1, r2), g.view(q1, q2)
    H = (B1.mT @ G @ B2).sum(0)
    wanted = (H @ A2 @ X.T, H.T @ A1 @ X, G @ B2 @ Z.T, G.T @ B1 @ Z, (A1.mT @ H @ A2).sum(0))
    for got, expected in zip(grads, wanted):
        assert relative(got, expected.reshape(got.shape)) <= 1e-10


def test_gradient_of_the_formed_path_is_the_rearranged_product():
    P, Q = (f.requires_grad_() for f in factors(3, 2, 2, 4, 3))
    M = kron_sum(P, Q)
    G = draw(*M.shape, seed=6)
    dP, dQ = torch.autograd.grad(M, (P, Q), G)
    R = kron_rearrange(G, 2, 2, 4, 3)
    torch.testing.assert_close(dP.flatten(1), Q.flatten(1) @ R.T)
    torch.testing.assert_close(dQ.flatten(1), P.flatten(1) @ R)


def test_function_transforms_agree_with_autograd():
    P, Q = factors(3, 2, 2, 4, 3)
    V, W = factors(3, 2, 2, 4, 3, seed=20)
    M, push = torch.func.jvp(kron_sum, (P, Q), (V, W))
    torch.testing.assert_close(push, by_definition(V, Q) + by_definition(P, W))
    G = draw(*M.shape, seed=6)
    dP, dQ = torch.func.vjp(kron_sum, P, Q)[1](G)
    assert (push * G).sum().item() == pytest.approx(((dP * V).sum() + (dQ * W).sum()).item())
    x = draw(5, 2, 12, seed=2)
    Ps, Qs = draw(5, 3, 2, 4), draw(5, 3, 2, 3, seed=1)
    for order in ("first", "second"):
        rows = torch.func.vmap(lambda p, q, v, o=order: kron_apply(p, q, v, o))(Ps, Qs, x)
        torch.testing.assert_close(rows, x @ kron_sum(Ps, Qs).mT)
    T = draw(3, 2, 2, seed=3)
    _, push3 = torch.func.jvp(lambda t: kron_sum3(P, Q, t), (T,), (2 * T,))
    torch.testing.assert_close(push3, 2 * kron_sum3(P, Q, T))


def test_compiles_into_one_graph():
    P, Q = factors(3, 2, 2, 4, 3)
    T, x = draw(3, 2, 2, seed=3), draw(5, 12, seed=2)

    def everything(P, Q, T, x):
        return [*kron_sum_many([(P, Q), (2 * P, Q)]), kron_sum3(P, Q, T), kron_apply(P, Q, x)]

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(P, Q, T, x), everything(P, Q, T, x))


def test_macs_are_the_sheet_formulas():
    S, r1, r2, p1, p2 = 16, 2, 2, 32, 24
    assert kron_macs(S, r1, r2, p1, p2, "first") == 26_112 == S * r1 * 768 * (1 + r2 / p1)
    assert kron_macs(S, r1, r2, p1, p2, "second") == S * r2 * 768 * (1 + r1 / p2)
    assert form_macs(S, r1, r2, p1, p2) == 16 * 4 * 768
    # the up side: q = rows, the r's are columns, B2 first
    assert kron_macs(S, 32, 24, 2, 2, "second") == S * 2 * 768 * (1 + 2 / 32)


def matmul_flops(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@given(sizes, st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_counted_macs_are_the_macs_that_run(shape, tokens):
    P, Q = factors(*shape)
    x = draw(tokens, shape[3] * shape[4])
    assert matmul_flops(kron_sum, P, Q) == 2 * form_macs(*shape)
    for order in ("first", "second"):
        ran = matmul_flops(kron_apply, P, Q, x, order)
        assert ran == 2 * tokens * kron_macs(*shape, order)
    best = min(kron_macs(*shape, order) for order in ("first", "second"))
    assert matmul_flops(kron_apply, P, Q, x) == 2 * tokens * best


def test_shapes_that_cannot_work_are_refused():
    P, Q = factors(3, 2, 2, 4, 3)
    with pytest.raises(InputError, match="one S"):
        kron_sum(P, Q[:2])
    with pytest.raises(InputError, match="one S"):
        kron_sum(P[0], Q[0])
    with pytest.raises(InputError, match=r"x \(..., i\*j\)"):
        kron_apply(P, Q, torch.zeros(5, 11, dtype=torch.float64))
    with pytest.raises(InputError, match="expected"):
        kron_rearrange(torch.zeros(4, 12), 2, 2, 4, 4)
    with pytest.raises(InputError, match="expected"):
        kron_restore(torch.zeros(8, 7), 2, 2, 4, 3)
    with pytest.raises(InputError, match="'first' or 'second'"):
        kron_macs(1, 1, 1, 1, 1, "third")
