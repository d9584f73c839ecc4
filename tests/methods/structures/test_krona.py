"""KronA against its definition, its rank and its sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import built, moved, rank, site, update

from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.methods.structures import KronA


@given(st.sampled_from([6, 12, 16, 30]), st.sampled_from([4, 18, 25, 7]))
@settings(max_examples=16, deadline=None)
def test_the_update_is_the_kronecker_product(out, inner):
    (delta,) = moved(KronA(alpha=0.5), site(out, inner))
    wanted = 0.5 * torch.kron(delta.P, delta.Q).detach()
    torch.testing.assert_close(update(delta), wanted)
    x = torch.randn(2, 3, inner).double()
    torch.testing.assert_close(delta(x), x @ wanted.T)


def test_the_rank_is_the_product_of_the_ranks():
    (delta,) = moved(KronA(), site(96, 96))
    assert (delta.P.shape, delta.Q.shape) == ((12, 12), (8, 8))
    assert rank(delta) == 96
    delta.P.data[5:] = 0
    assert rank(delta) == 40


@pytest.mark.parametrize(("size", "count", "row"), [(768, 1_600, 86_016), (4096, 8_192, 1_048_576)])
def test_counts(size, count, row):
    shape = SiteShape("s", size, size)
    assert KronA().num_parameters(shape) == count
    assert KronA().flops(shape, 1) == row


def test_the_first_gradient_reaches_q_only():
    (delta,), _, _ = built(KronA(), site(12, 10))
    delta(torch.randn(4, 10)).sum().backward()
    assert delta.Q.grad.norm() > 0
    assert delta.P.grad.norm() == 0


def test_what_does_not_divide_is_named():
    with pytest.raises(PlanError, match=r"factors=\(5, 4\).*'site' \(12x10\).*5.*12.*nearest: 4"):
        KronA(factors=(5, 4)).plan([site(12, 10)])
    with pytest.raises(InputError, match=r"factors=\(0, 4\)"):
        KronA(factors=(0, 4))
    with pytest.raises(InputError, match="alpha"):
        KronA(alpha=0.0)
    (delta,), _, _ = built(KronA(factors=(3, 2)), site(12, 10))
    assert (delta.P.shape, delta.Q.shape) == ((3, 2), (4, 5))
