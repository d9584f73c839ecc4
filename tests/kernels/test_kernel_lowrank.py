"""The fused low-rank product: equal to its reference, exact gradients, few products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import DEVICE, draw, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from finespun.kernels.lowrank import low_rank_linear, low_rank_linear_reference, plain

WIDE = torch.float64


def tensors(lead=(4,), n=6, m=5, r=2, dtype=WIDE, bias=True):
    """x, W, b, A, B with gradients."""
    shapes = [(*lead, n), (m, n), (m,), (r, n), (m, r)]
    drawn = [draw(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    if not bias:
        drawn[2] = None
    return drawn


def gradients(function, inputs, *rest):
    y = function(*inputs, *rest)
    goal = draw(*y.shape, seed=9, dtype=y.dtype)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return y, torch.autograd.grad((y * goal).sum(), wanted)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([None, "scalar", "rows"]),
)
@settings(max_examples=60, deadline=None)
def test_value_and_gradients_equal_the_reference(lead, n, m, r, bias, gain):
    inputs = tensors(tuple(lead), n, m, r, bias=bias)
    weight = {None: None, "scalar": torch.tensor(0.3), "rows": torch.linspace(0.2, 2, m)}[gain]
    weight = None if weight is None else weight.to(DEVICE, WIDE)
    y, got = gradients(low_rank_linear, inputs, 1.7, weight)
    z, wanted = gradients(low_rank_linear_reference, inputs, 1.7, weight)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [(1, 2), (0, 1, 2), (1, 2, 3), (1, 2, 4), (0, 1, 2, 3)])
def test_gradients_of_what_is_asked_only(frozen):
    inputs = tensors()
    for i in frozen:
        inputs[i].requires_grad_(False)
    for a, b in zip(
        gradients(low_rank_linear, inputs, 0.5)[1],
        gradients(low_rank_linear_reference, inputs, 0.5)[1],
    ):
        assert relative(a, b) <= 1e-12


def test_gradients_against_finite_differences():
    inputs = tensors()
    assert torch.autograd.gradcheck(lambda *t: low_rank_linear(*t, 1.3, None), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: low_rank_linear(*t, 1.3, None), inputs)


def dropped(*inputs):
    torch.manual_seed(4)
    return low_rank_linear(*inputs, 1.3, None, 0.4)


def test_dropout_has_the_gradients_of_its_own_mask():
    assert torch.autograd.gradcheck(dropped, tensors((3, 2)))
    assert torch.autograd.gradgradcheck(dropped, tensors((3, 2)))


def test_a_gain_scales_the_gradients_of_a_and_b_only():
    inputs = tensors()
    before = gradients(low_rank_linear, inputs, 0.5)[1]
    after = gradients(low_rank_linear, inputs, 0.5, torch.tensor(0.2, dtype=WIDE, device=DEVICE))[1]
    for i, factor in enumerate((1.0, 1.0, 1.0, 0.2, 0.2)):
        assert relative(after[i], factor * before[i]) <= 1e-12


class Count(TorchDispatchMode):
    """Counts matrix products and the largest tensor that any operator allocates."""

    def __init__(self):
        super().__init__()
        self.products, self.allocated = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.products += name in ("mm", "addmm", "addmm_", "bmm")
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.allocated.append(out.numel())
        return out


def test_three_products_forward_and_five_backward():
    x, W, b, A, B = tensors((64,), n=32, m=48, r=4, dtype=torch.float32)
    W.requires_grad_(False)
    b.requires_grad_(False)
    with Count() as forward:
        y = low_rank_linear(x, W, b, A, B, 0.5)
    assert forward.products == 3
    assert [n for n in forward.allocated if n >= y.numel()] == [y.numel()]
    with Count() as backward:
        y.backward(torch.ones_like(y))
    assert backward.products == 5
    assert [n for n in backward.allocated if n >= x.numel()] == [y.numel(), x.numel()]


def test_the_fast_version_takes_plain_tensors_of_one_dtype_only():
    x, W, _, A, B = (None if t is None else t.detach() for t in tensors())
    assert plain(x, W, nn.Parameter(A), B)
    assert not plain(x, W.float(), A, B)

    class Odd(torch.Tensor):
        pass

    assert not plain(x, W.as_subclass(Odd), A, B)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert not plain(x, W, A, B)
    seen = []
    torch.func.vmap(lambda row: seen.append(plain(row, W, A, B)) or row)(x)
    assert seen == [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_base_takes_the_update_in_float32(dtype):
    x, W, b, A, B = (t.detach() for t in tensors(dtype=torch.float32))
    low = [t.to(dtype) for t in (x, W, b)]
    y = low_rank_linear(*low, A, B, 0.5)
    assert y.dtype == dtype
    base = torch.nn.functional.linear(*low)
    wanted = base + (0.5 * (low[0].float() @ A.T) @ B.T).to(dtype)
    assert torch.equal(y, wanted)


def test_under_autocast_and_vmap_the_result_stands():
    x, W, b, A, B = (t.detach() for t in tensors(dtype=torch.float32))
    wanted = low_rank_linear(x, W, b, A, B, 0.5)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert relative(low_rank_linear(x, W, b, A, B, 0.5), wanted) < 2e-2
    rows = torch.func.vmap(lambda row: low_rank_linear(row, W, b, A, B, 0.5))(x)
    assert relative(rows, wanted) <= 1e-6
