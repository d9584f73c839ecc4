"""GraLoRA against its definition, PEFT, and the facts of arXiv 2505.20355."""

import pytest
import torch
from peers import agrees, built, fit, moved, peft, rank, site, update

import finespun as fs
from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.methods.structures import GraLoRA


def test_cells_are_small_loras():
    (delta,) = moved(GraLoRA(rank=8, k=4, alpha=8.0), site(96, 64))
    W = update(delta)
    for j in range(4):
        for n in range(4):
            A, B = delta.A[n, 2 * j : 2 * j + 2], delta.B[j, :, 2 * n : 2 * n + 2]
            cell = W[24 * j : 24 * j + 24, 16 * n : 16 * n + 16]
            torch.testing.assert_close(cell, B @ A, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hybrid", [0, 3])
def test_block_forward_is_the_dense_update(hybrid):
    (delta,) = moved(GraLoRA(rank=8, k=4, hybrid_rank=hybrid), site(96, 64))
    for shape in ((64,), (5, 64), (2, 3, 64), (2, 2, 3, 64)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(delta(x), x @ update(delta).T, rtol=1e-12, atol=1e-12)


def test_rank_is_k_times_r():
    (delta,) = moved(GraLoRA(rank=16, k=4), site(96, 64))
    assert rank(delta) == 64
    assert delta.low_rank()[0].shape == (64, 64)
    cell = update(delta)[:24, :16]
    assert int(torch.linalg.matrix_rank(cell)) == 4


@pytest.mark.parametrize("k", [1, 2, 4])
def test_numbers_are_loras(k):
    for size, count, operations in ((768, 49_152, 98_304), (4096, 262_144, 524_288)):
        shape = SiteShape("s", size, size)
        assert GraLoRA(k=k).num_parameters(shape) == fs.LoRA(rank=32).num_parameters(shape) == count
        assert GraLoRA(k=k).flops(shape) == operations


def test_one_block_is_lora_bit_for_bit():
    where, x = site(12, 10), torch.randn(3, 10)
    (gra,), _, _ = built(GraLoRA(rank=4, k=1), where)
    (lora,), _, _ = built(fs.LoRA(rank=4), where)
    assert torch.equal(gra.A[0], lora.A)
    lora.B.data.normal_()
    gra.B.data.copy_(lora.B[None])
    assert torch.equal(gra(x), lora(x))


def test_the_draw_belongs_to_a_block_of_inputs():
    (delta,), _, _ = built(GraLoRA(rank=64, k=4), site(512, 512))
    bound = (4 / 512) ** 0.5
    assert 0.99 * bound < float(delta.A.detach().abs().max()) <= bound


def test_an_outlier_channel_reaches_one_column_of_cells():
    (delta,) = moved(GraLoRA(rank=8, k=4), site(32, 32))
    x, g = torch.randn(6, 32).double(), torch.randn(6, 32).double()
    loud = x.clone()
    loud[:, 3] *= 100
    before, after = (torch.autograd.grad((delta(v) * g).sum(), delta.B)[0] for v in (x, loud))
    changed = (before != after).unflatten(-1, (4, 2)).any(-1).any(1)
    assert changed.sum() == 4
    assert changed[:, 0].all()


@pytest.mark.parametrize("hybrid", [0, 4])
def test_outputs_are_pefts(hybrid):
    from peft import GraloraConfig

    config = GraloraConfig(r=8, alpha=20, gralora_k=4, hybrid_r=hybrid)
    layer = peft(config, (24, 16)).fc0
    (delta,), _, _ = built(GraLoRA(rank=8, alpha=20.0, k=4, hybrid_rank=hybrid), site(24, 16))
    delta.A.data.copy_(layer.gralora_A["default"].mT)
    delta.B.data.copy_(layer.gralora_B["default"].mT)
    if hybrid:
        delta.A_hybrid.data.copy_(layer.gralora_A_general["default"].weight)
        delta.B_hybrid.data.copy_(layer.gralora_B_general["default"].weight)
    assert agrees(delta, layer) <= 1e-5


def test_what_does_not_divide_is_named():
    with pytest.raises(InputError, match=r"k=3.*rank=32.*4"):
        GraLoRA(k=3)
    with pytest.raises(PlanError, match=r"k=4.*out=50.*'site'.*2"):
        GraLoRA(k=4).plan([site(50, 64)])


@pytest.mark.slow
def test_a_grid_is_learnt_where_lora_of_equal_size_fails():
    torch.manual_seed(0)
    target = torch.einsum("jno,jni->joni", *torch.randn(2, 4, 4, 16)).reshape(64, 64)
    target /= target.norm()
    assert fit(GraLoRA(rank=4, k=4), target, rate=1e-2, steps=2000) < 0.01
    assert 0.5 < fit(fs.LoRA(rank=4), target, rate=1e-2, steps=2000) < 0.75
