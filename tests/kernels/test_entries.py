"""Products with a few entries of a matrix: the fast version against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import DEVICE

from finespun.kernels.entries import (
    Entries,
    entries_gradient,
    entries_linear,
    entries_linear_reference,
    entries_of,
    write_entries,
)


def case(out, inner, count, rows=(4, 3), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.randperm(out * inner, generator=g)[:count].sort().values.to(DEVICE)
    x = torch.randn(*rows, inner, generator=g, dtype=dtype).to(DEVICE)
    v = torch.randn(count, generator=g, dtype=dtype).to(DEVICE)
    return Entries(index, (out, inner)), x.requires_grad_(), v.requires_grad_()


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from([(), (1,), (7,), (2, 3), (0,)]),
)
@settings(max_examples=60, deadline=None)
def test_it_is_the_plain_product_with_its_gradients(out, inner, density, rows):
    at, x, v = case(out, inner, max(1, int(density * out * inner)), rows)
    fast, plain = entries_linear(x, v, at), entries_linear_reference(x, v, at)
    torch.testing.assert_close(fast, plain)
    dy = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(fast, (x, v), dy), torch.autograd.grad(plain, (x, v), dy)):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_second_derivatives():
    at, x, v = case(30, 50, 100)
    assert torch.autograd.gradcheck(lambda x, v: entries_linear(x, v, at), (x, v))
    assert torch.autograd.gradgradcheck(lambda x, v: entries_linear(x, v, at), (x, v))


def test_the_gradient_alone():
    at, x, _ = case(30, 50, 100)
    dy = torch.randn(4, 3, 30, dtype=torch.float64, device=DEVICE)
    whole = torch.einsum("bto,bti->oi", dy, x)
    torch.testing.assert_close(entries_gradient(dy, x, at), whole.flatten()[at.index])


def test_transforms_and_low_precision_take_the_plain_one():
    at, x, v = case(30, 50, 100)
    each = torch.func.vmap(lambda row: entries_linear(row, v, at))(x.flatten(0, 1))
    torch.testing.assert_close(each, entries_linear(x, v, at).flatten(0, 1))
    half = entries_linear(x.bfloat16(), v.bfloat16(), at)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), entries_linear(x, v, at), rtol=0.05, atol=0.1)


VIEWS = {
    "as it is": lambda W: W,
    "turned": lambda W: W.T,
    "a part": lambda W: W[3:17],
    "a part, turned": lambda W: W.T[5:21, 2:19],
    "every other": lambda W: W[::2, 1::3],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_entries_are_read_and_written_wherever_they_lie(dtype, view):
    """What is read and written again leaves no trace, and nothing else ever moves."""
    g = torch.Generator().manual_seed(1)
    whole = torch.randn(20, 30, generator=g).to(DEVICE, dtype)
    W = VIEWS[view](whole)
    before, around = W.clone(), whole.clone()
    index = torch.randperm(W.numel(), generator=g)[:50].sort().values.to(DEVICE)
    values = torch.randn(50, generator=g).to(DEVICE)
    old = entries_of(W, index)
    assert torch.equal(old, before.flatten()[index])
    write_entries(W, index, values)
    wanted = before.flatten().clone()
    wanted[index] = values.to(dtype)
    assert torch.equal(W.flatten(), wanted)
    write_entries(W, index, old)
    assert torch.equal(whole, around)
