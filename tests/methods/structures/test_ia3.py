"""IA3 against its definition and PEFT, whose gain acts on the bias too."""

import pytest
import torch
from peers import Layers, adapted, moved, outputs_agree, peft, site, update

import finespun as fs
from finespun.contract import SiteShape
from finespun.methods.structures import IA3


@pytest.mark.parametrize("side", ["out", "in"])
def test_outputs_are_pefts(side):
    from peft import IA3Config

    config = IA3Config(feedforward_modules=["fc0"] if side == "in" else [])
    layer = peft(config, (24, 16), bias=True).fc0
    ours, delta = adapted(IA3(feedforward=("fc0",) if side == "in" else ()), layer)
    delta.g.data.copy_(layer.ia3_l["default"].flatten())
    assert outputs_agree(ours, layer) <= 1e-5


def test_gains_multiply_rows_or_columns():
    where = site(12, 10)
    (rows,) = moved(IA3(), where)
    torch.testing.assert_close(update(rows), (rows.g.detach() - 1)[:, None] * where.value)
    (columns,) = moved(IA3(feedforward=("site",)), where)
    torch.testing.assert_close(update(columns), where.value * (columns.g.detach() - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feedforward", [(), ("fc0",)])
def test_the_start_is_the_base_bit_for_bit(dtype, feedforward):
    model = Layers((40, 24), bias=True).to(dtype)
    x = torch.randn(7, 24).to(dtype)
    before = model.fc0(x)
    fs.adapt(model, IA3(feedforward=feedforward), ["fc0"], train_modules=())
    assert torch.equal(model.fc0(x), before)


def test_a_small_gain_survives_a_half_precision_base():
    model = Layers((40, 24)).to(torch.bfloat16)
    delta = fs.adapt(model, IA3(), ["fc0"], train_modules=()).deltas["fc0"]
    x = torch.randn(64, 24).to(torch.bfloat16)
    before = model.fc0(x)
    delta.g.data += 2**-8
    assert delta.g.dtype == torch.float32
    assert not torch.equal(model.fc0(x), before)


def test_merging_and_taking_back_is_exact():
    model = Layers((24, 16), bias=True)
    weight, bias = model.fc0.weight.clone(), model.fc0.bias.clone()
    adapter = fs.adapt(model, IA3(), ["fc0"], train_modules=())
    adapter.deltas["fc0"].g.data.zero_()
    adapter.merge()
    assert model.fc0.bias.norm() == model.fc0.weight.norm() == 0
    adapter.unmerge()
    assert torch.equal(model.fc0.weight, weight)
    assert torch.equal(model.fc0.bias, bias)


def test_counts_and_suffixes():
    form = IA3(feedforward=("output.dense",))
    assert form.num_parameters(SiteShape("layer.0.output.dense", 768, 3072)) == 3072
    assert form.num_parameters(SiteShape("layer.0.key", 768, 512)) == 768
    assert form.num_parameters(SiteShape("layer.0.myoutput.dense", 768, 3072)) == 768
    assert form.flops(SiteShape("layer.0.key", 768, 512), 10) == 7680
