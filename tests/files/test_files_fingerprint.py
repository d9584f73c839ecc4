"""The fingerprint knows its base again, adapted, merged, rounded or quantised, and no other."""

import copy
import json

import pytest
import torch
from suite import Net, batch, net
from torch import nn

import finespun as fs
from finespun.errors import BaseMismatch, FileError, StateError
from finespun.files import Fingerprint, check_base, fingerprint


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy whose matrices are rounded row by row to `bits` bits."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        if p.dim() > 1:
            step = p.data.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            p.data = (p.data / step).round() * step
    return twin


def test_adapting_merging_and_detaching_change_nothing():
    model = net()
    before = fingerprint(model)
    adapter = fs.adapt(model, fs.LoRA(rank=2), r"blocks\.\d\.up", ("head",))
    for p in adapter.parameters():
        p.data.add_(torch.randn_like(p))
    assert fingerprint(model) == before
    adapter.merge()
    merged = model(batch())
    assert fingerprint(model) == before
    assert torch.equal(model(batch()), merged)
    adapter.unmerge()
    adapter.detach()
    assert fingerprint(model) == before
    assert fingerprint(net()) == before


def test_a_merge_without_undo_has_no_fingerprint():
    model = net()
    adapter = fs.adapt(model, fs.LoRA(rank=2), r"blocks\.\d\.up", ())
    adapter.merge(undo="none")
    with pytest.raises(StateError, match="undo='none'"):
        fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_passes_with_a_note(dtype):
    notes = check_base(fingerprint(net()), net().to(dtype))
    assert notes == [f"the base is {str(dtype)[6:]} here and was float32"]
    back = check_base(fingerprint(net().to(dtype)), net())
    assert back == [f"the base is float32 here and was {str(dtype)[6:]}"]
    assert check_base(fingerprint(net()), net()) == []


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_copy_passes_with_a_note(bits):
    for here, there in ((net(), rounded(net(), bits)), (rounded(net(), bits), net())):
        (note,) = check_base(fingerprint(here), there)
        assert "as in a quantised copy" in note


def test_weights_quantised_by_torchao_pass_with_a_note():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = net()
    quantize_(model, Int8WeightOnlyConfig())
    assert any("as in a quantised copy" in n for n in check_base(fingerprint(net()), model))
    assert check_base(fingerprint(model), copy.deepcopy(model)) == []
    with pytest.raises(BaseMismatch):
        check_base(fingerprint(net(seed=9)), model)


def retrained(model: nn.Module) -> nn.Module:
    """A copy in which every parameter moved by a hundredth."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.add_(0.01 * torch.randn_like(p) * p.data.abs().mean())
    return twin


@pytest.mark.parametrize(
    "other", [net(seed=9), retrained(net()), net(seed=9).bfloat16()], ids=["seed", "tuned", "both"]
)
def test_another_base_is_refused_naming_both_and_the_tensor(other):
    mine = fingerprint(net())
    with pytest.raises(BaseMismatch) as caught:
        check_base(mine, other)
    told = str(caught.value)
    assert str(mine) in told
    assert str(fingerprint(other)) in told
    assert str(mine) != str(fingerprint(other))
    assert "differs by" in told
    (note,) = check_base(mine, other, force=True)
    assert note in told


def test_other_shapes_and_names_are_refused():
    wide = net()
    wide.blocks[0].up = nn.Linear(24, 41)
    with pytest.raises(BaseMismatch, match=r"4,189 parameters there, 4,214 here"):
        check_base(fingerprint(net()), wide)
    renamed = net()
    renamed.top = renamed.head
    del renamed.head
    with pytest.raises(BaseMismatch, match="names or shapes"):
        check_base(fingerprint(net()), renamed)


def test_a_head_that_the_adapter_brings_itself_does_not_count():
    mine = fingerprint(net(), ("head",))
    fresh = net()
    fresh.head = nn.Linear(24, 9)
    assert check_base(mine, fresh) == []
    with pytest.raises(BaseMismatch):
        check_base(fingerprint(net()), fresh)


def test_another_class_around_the_same_weights_passes():
    class Same(Net):
        pass

    model = Same().eval()
    model.load_state_dict(net().state_dict())
    assert check_base(fingerprint(net()), model) == []


def test_weights_that_are_not_there_cannot_be_compared():
    (note,) = check_base(fingerprint(net()), net().to("meta"))
    assert "no sampled weight" in note


def test_it_holds_what_it_says_and_travels_as_json():
    mine = fingerprint(net())
    assert mine.architecture == "Net"
    assert mine.numbers == sum(p.numel() for p in net().parameters())
    matrices = [n for n in mine.samples if net().get_parameter(n).dim() > 1]
    assert len(matrices) == 5
    assert len(mine.samples) == 9
    assert all(len(v) == min(32, net().get_parameter(n).numel())
               for n, (_, v) in mine.samples.items())  # fmt: skip
    for name, (dtype, values) in mine.samples.items():
        assert dtype == "float32"
        assert set(torch.tensor(values).tolist()) <= set(
            net().get_parameter(name).flatten().tolist()
        )
    assert Fingerprint.from_json(json.loads(json.dumps(mine.as_json())), "x") == mine
    less = {k: v for k, v in mine.as_json().items() if k != "numbers"}
    with pytest.raises(FileError, match=r"x: base.numbers is missing"):
        Fingerprint.from_json(less, "x")


def test_values_are_read_where_few_would_look_alike():
    """Positions spread over the whole tensor, not down one column."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    model[0].weight.data = torch.arange(4096.0).view(64, 64)
    ((_, values),) = fingerprint(model).samples.values()
    rows, columns = {int(v) // 64 for v in values}, {int(v) % 64 for v in values}
    assert len(values) == 32
    assert len(rows) > 25
    assert len(columns) > 15
