"""Quantised bases: torchao's int8 and 4-bit, bitsandbytes' NF4 and int8, all of which run on a CPU
too."""

import copy
import os

os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

import pytest
import torch
from suite import DEVICE
from torch import nn

import finespun as fs
from finespun.errors import StateError, TargetError


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 64)).to(DEVICE)


def inputs():
    return torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def torchao(config, **options):
    from torchao import quantization

    model = plain()
    quantization.quantize_(model, getattr(quantization, config)(**options))
    return model


def bits(name, **options):
    import bitsandbytes as bnb

    model, cls = plain(), getattr(bnb.nn, name)
    for i in (0, 2):
        old = model[i]
        model[i] = cls(old.in_features, old.out_features, **options)
        model[i].load_state_dict(old.state_dict())
    return model.to(DEVICE)


BASES = {
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao 4-bit": lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "bitsandbytes nf4": lambda: bits("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
    "bitsandbytes int8": lambda: bits("Linear8bitLt", has_fp16_weights=False),
}
STRUCTURES = {
    "lora": fs.LoRA(rank=4),
    "lsr": fs.LSR(rank=4, separation_rank=4),
    "dora": fs.make("dora", rank=4),
    "s2ft": fs.make("s2ft", channels=0.1, select="weight", outputs=["0"]),
}


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_adapts_merges_to_float_and_comes_back_bit_for_bit(base, structure):
    model, x = base(), inputs()
    y0 = model(x)
    adapter = fs.adapt(model, structure, ["0", "2"])
    if structure.kind == "dora":
        torch.testing.assert_close(model(x), y0, atol=1e-2, rtol=1e-2)
    else:
        assert torch.equal(model(x), y0)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2)
    for _ in range(3):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    y, stored = model(x), model[0].weight
    assert float((y - y0).detach().abs().max()) > 0.02
    adapter.merge()
    assert model[0].weight.dtype == torch.float32
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-4)
    with adapter.disabled():
        assert torch.equal(model(x), y0)
    adapter.unmerge()
    assert model[0].weight is stored
    assert torch.equal(model(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    adapter.detach()
    assert torch.equal(model(x), y0)


def test_a_layer_quantised_after_it_was_adapted_acts_and_is_not_merged():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, x = plain(), inputs()
    adapter = fs.adapt(model, fs.LoRA(rank=4), ["0", "2"])
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    y = model(x)
    quantize_(model, Int8WeightOnlyConfig())
    torch.testing.assert_close(model(x), y, atol=0.1, rtol=0.1)
    z = model(x)
    with pytest.raises(StateError, match="'0' was quantised after it was adapted"):
        adapter.merge()
    assert torch.equal(model(x), z)
    assert float((z - BASES["torchao int8"]()(x)).detach().abs().max()) > 0.1


def test_parts_of_a_quantised_layer_are_refused():
    with pytest.raises(TargetError, match="no plain linear layer"):
        fs.adapt(BASES["torchao int8"](), fs.LoRA(rank=2), ["0:q"])
