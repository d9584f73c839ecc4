"""C3A against its definition and PEFT."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import adapted, moved, outputs_agree, peft, rank, site, update

from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.methods.structures import C3A


@given(st.sampled_from([1, 2, 3, 4, 6, 12]))
@settings(max_examples=6, deadline=None)
def test_blocks_are_circulant_and_ffts_multiply_by_them(b):
    (delta,) = moved(C3A(block_size=b), site(24, 12))
    W, w = update(delta), delta.w.detach()
    for k in range(24):
        for t in range(12):
            wanted = w[k // b, t // b, (t % b - k % b) % b] / 12
            assert float(W[k, t]) == pytest.approx(float(wanted), abs=1e-15)
    x = torch.randn(2, 3, 12).double()
    torch.testing.assert_close(delta(x), x @ W.T)


def test_one_kernel_has_full_rank():
    (delta,) = moved(C3A(block_size=24), site(24, 24))
    assert delta.w.numel() == 24
    assert rank(delta) == 24


@pytest.mark.parametrize("b", [4, 8])
def test_outputs_are_pefts(b):
    from peft import C3AConfig

    layer = peft(C3AConfig(block_size=b), (24, 16), bias=True).fc0
    ours, delta = adapted(C3A(block_size=b), layer)
    delta.w.data.copy_(layer.c3a_kernel["default"])
    assert outputs_agree(ours, layer) <= 1e-5
    x, dy = torch.randn(5, 16), torch.randn(5, 24)
    for one in (ours, layer):
        (one(x) * dy).sum().backward()
    torch.testing.assert_close(delta.w.grad, layer.c3a_kernel["default"].grad)


def test_counts():
    shape = SiteShape("s", 768, 3072)
    assert C3A().num_parameters(shape) == 3 * 12 * 256
    assert C3A().flops(shape, 1) < 2 * 768 * 3072
    assert C3A(block_size=1).flops(SiteShape("s", 2, 3)) == 5 + 8 * 6 + 6


def test_what_cannot_be_is_named():
    with pytest.raises(PlanError, match=r"block_size=256.*out=40 and in=24.*8"):
        C3A().plan([site(40, 24)])
    with pytest.raises(InputError, match=r"block_size=0.*256"):
        C3A(block_size=0)
