"""MELoRA: slices that do not meet."""

import pytest
import torch
from peers import built, moved, rank, site, update

import finespun as fs
from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.methods.structures import MELoRA


def test_counts():
    shape = SiteShape("s", 768, 768)
    assert MELoRA().num_parameters(shape) == 6_144
    assert MELoRA(rank=16, blocks=4).num_parameters(shape) == 6_144
    assert MELoRA().flops(shape) == 12_288


def test_each_slice_is_a_small_lora_and_the_rest_is_zero():
    (delta,) = moved(MELoRA(rank=6, blocks=3), site(24, 18))
    W = update(delta)
    for i in range(3):
        block = W[8 * i : 8 * i + 8, 6 * i : 6 * i + 6]
        torch.testing.assert_close(block, 2 * delta.B[i] @ delta.A[i])
        block.zero_()
    assert torch.count_nonzero(W) == 0
    x = torch.randn(2, 5, 18).double()
    torch.testing.assert_close(delta(x), x @ update(delta).T, rtol=1e-12, atol=1e-12)


def test_the_rank_is_r():
    (delta,) = moved(MELoRA(rank=16, blocks=4), site(96, 96))
    assert rank(delta) == 16


def test_one_block_is_lora():
    (me,), _, _ = built(MELoRA(rank=4, blocks=1), site(12, 10))
    (lora,), _, _ = built(fs.LoRA(rank=4), site(12, 10))
    assert torch.equal(me.A[0], lora.A)
    assert me.scale == lora.scale


def test_what_does_not_divide_is_named():
    with pytest.raises(InputError, match=r"blocks=3.*rank=8.*4"):
        MELoRA(blocks=3)
    with pytest.raises(PlanError, match=r"blocks=4.*out=50 and in=18.*2"):
        MELoRA(blocks=4).plan([site(50, 18)])
