"""DoRA against its definition, PEFT, and the facts of arXiv 2402.09353."""

import pytest
import torch
from peers import Layers, adapted, built, moved, outputs_agree, peft, rank, site, update

import finespun as fs
from finespun.contract import SiteShape
from finespun.methods.structures import DoRA


def test_rows_of_the_adapted_weight_have_length_m():
    (delta,) = moved(DoRA(rank=3), site(12, 10))
    W = delta.map_weight(delta.base_weight())
    torch.testing.assert_close(W.norm(dim=1), delta.m.abs())
    V = delta.base_weight() + delta.scale * delta.B @ delta.A
    cosine = torch.nn.functional.cosine_similarity(V * delta.m.sign()[:, None], W, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_the_gradient_holds_the_norm_constant():
    (delta,) = moved(DoRA(rank=3, alpha=3.0), site(12, 10))
    G, w0 = torch.randn(12, 10).double(), delta.base_weight()
    (delta.map_weight(w0) * G).sum().backward()
    V = (w0 + delta.B @ delta.A).detach()
    gain = (delta.m / V.norm(dim=1)).detach()[:, None]
    torch.testing.assert_close(delta.B.grad, (gain * G) @ delta.A.detach().T)
    torch.testing.assert_close(delta.m.grad, ((V / V.norm(dim=1, keepdim=True)) * G).sum(1))


def test_the_update_has_full_rank():
    (delta,) = moved(DoRA(rank=1), site(24, 20))
    assert rank(delta) == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_start_is_the_base_bit_for_bit(dtype):
    model = Layers((40, 24), bias=True).to(dtype)
    x = torch.randn(7, 24).to(dtype)
    before = model.fc0(x)
    delta = fs.adapt(model, DoRA(rank=2), ["fc0"], train_modules=()).deltas["fc0"]
    assert torch.equal(model.fc0(x), before)
    assert torch.count_nonzero(delta.dense(delta.base_weight())) == 0


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_are_pefts(bias):
    from peft import LoraConfig

    layer = peft(LoraConfig(r=4, lora_alpha=12, use_dora=True), (24, 16), bias=bias).fc0
    ours, delta = adapted(DoRA(rank=4, alpha=12.0), layer)
    torch.testing.assert_close(delta.m, layer.base_layer.weight.norm(dim=1))
    delta.A.data.copy_(layer.lora_A["default"].weight)
    delta.B.data.copy_(layer.lora_B["default"].weight)
    delta.m.data.copy_(layer.lora_magnitude_vector["default"].weight)
    assert outputs_agree(ours, layer) <= 1e-5


@pytest.mark.parametrize(("size", "count", "row"), [(768, 13_056, 26_880), (4096, 69_632, 143_360)])
def test_counts(size, count, row):
    form, shape = DoRA(rank=8), SiteShape("s", size, size)
    assert form.num_parameters(shape) == count
    assert form.flops(shape, 1) - form.flops(shape, 0) == row
    assert form.flops(shape, 0) == 2 * 8 * size**2 + 2 * size**2


def test_lora_is_dora_of_unchanged_lengths():
    (delta,), _, _ = built(DoRA(rank=2), site(8, 6))
    delta.double()
    delta.B.data.normal_()
    V = delta.base_weight() + delta.scale * (delta.B @ delta.A).detach()
    delta.m.data.copy_(V.norm(dim=1))
    torch.testing.assert_close(update(delta), V - delta.base_weight())
