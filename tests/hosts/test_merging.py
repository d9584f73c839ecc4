"""The shared suite, part three: into the base weights and out of them again."""

import pytest
import torch
from suite import (
    CASES,
    adapted,
    batch,
    bytes_of,
    every,
    mergeable,
    net,
    relative,
    same,
    stirred,
    twin,
)
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.errors import InputError, StateError


def pointers(model):
    """Where every parameter of the plain model lies."""
    return {
        n: p.data_ptr()
        for n, p in model.named_parameters()
        if "deltas" not in n and "bank" not in n
    }


def base_of(model, plain):
    """The state of the model's own parameters."""
    return {k: v.clone() for k, v in model.state_dict().items() if k in plain.state_dict()}


@every(mergeable)
def test_a_merged_model_computes_the_same(case):
    x, plain = batch(), net()
    model, adapter = stirred(case, twin(plain), ("head",))
    wanted = model(x)
    kept = adapter.merge()
    assert kept >= sum(4 * s.in_features * s.out_features for s in adapter.attached.plan.sites)
    assert relative(model(x), wanted) <= 2e-6
    assert not same(base_of(model, plain), bytes_of(plain))
    with pytest.raises(StateError, match="merged already"):
        adapter.merge()
    with pytest.raises(StateError, match="unmerge it before"):
        adapter.detach()
    with pytest.raises(StateError, match="unmerge it before"):
        adapter.scale = 0.5
    with pytest.raises(StateError, match="unmerge"), fs.rows(model, ["default"]):
        pass
    adapter.unmerge()
    assert torch.equal(model(x), wanted)
    with pytest.raises(StateError, match="nothing is merged"):
        adapter.unmerge()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every(mergeable)
def test_unmerge_puts_the_very_tensors_back(case, dtype):
    plain = net(dtype)
    model, adapter = stirred(case, twin(plain))
    x = batch(dtype=dtype)
    before, y = pointers(model), model(x)
    adapter.merge()
    assert relative(model(x), y) <= {4: 2e-6, 2: 3e-2}[dtype.itemsize]
    assert {k: v for k, v in pointers(model).items() if "up.weight" in k}.items() - before.items()
    adapter.unmerge()
    assert pointers(model) == before
    assert same(base_of(model, plain), bytes_of(plain))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every(lambda case: mergeable(case) and case.zero)
def test_merging_the_start_changes_no_bit(case, dtype):
    plain = net(dtype)
    model, adapter = adapted(case, twin(plain))
    adapter.merge()
    assert same(base_of(model, plain), bytes_of(plain))


@every(mergeable)
def test_partial_strength(case):
    model, adapter = stirred(case, net())
    adapter.scale = 0.5
    fs.activate(model, {"default": 0.6})
    x = batch()
    wanted = model(x)
    adapter.merge(weight=0.6)
    assert relative(model(x), wanted) <= 2e-6


@every(mergeable)
def test_two_adapters_merge_together(case):
    model, first = stirred(case, net(), name="one")
    stirred(case, model, name="another")
    weights, x = {"one": 0.7, "another": 0.3}, batch()
    fs.activate(model, weights)
    wanted = model(x)
    hosts.merge(model, weights)
    assert relative(model(x), wanted) <= 2e-6
    first.unmerge()
    assert torch.equal(model(x), wanted)


@every(mergeable)
def test_in_place_keeps_no_copy_and_says_so(case):
    model, adapter = stirred(case, net())
    x, before = batch(), pointers(model)
    wanted = model(x)
    assert adapter.merge(undo="none") == 0
    assert pointers(model) == before
    assert relative(model(x), wanted) <= 2e-6
    with pytest.raises(StateError, match="undo='none'"):
        adapter.unmerge()
    with pytest.raises(StateError, match="undo='none'"), adapter.disabled():
        pass


@every(mergeable)
def test_disabled_shows_the_base_while_merged(case):
    plain, x = net(), batch()
    model, adapter = stirred(case, twin(plain), ("head",))
    adapter.merge()
    merged, where = model(x), pointers(model)
    with adapter.disabled():
        assert torch.equal(model(x), plain(x))
    assert pointers(model) == where
    assert torch.equal(model(x), merged)


@every(mergeable)
def test_an_error_on_the_way_restores_every_weight(case, monkeypatch):
    plain = net()
    model, adapter = stirred(case, twin(plain))
    before = pointers(model)
    last = list(adapter.deltas.values())[-1]

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(last, "dense", fail)
    monkeypatch.setattr(last, "factors", fail)
    monkeypatch.setattr(last, "sparse", fail)
    with pytest.raises(MemoryError):
        adapter.merge()
    assert pointers(model) == before
    assert same(base_of(model, plain), bytes_of(plain))
    assert hosts.adapter_set_of(model).merged == {}


@every(lambda case: not mergeable(case))
def test_what_cannot_be_merged_is_refused(case):
    plain = net()
    model, adapter = stirred(case, twin(plain))
    with pytest.raises(StateError, match="cannot be merged"):
        adapter.merge()
    assert same(base_of(model, plain), bytes_of(plain))


def test_an_unknown_undo_and_an_unknown_name_are_refused():
    model, adapter = adapted(CASES[0])
    with pytest.raises(InputError, match="'disk'"):
        adapter.merge(undo="disk")
    with pytest.raises(InputError, match="'default'"):
        hosts.merge(model, {"defualt": 1.0})


def test_tied_weights_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.out.weight = self.table.weight

    model = Tied()
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["out"], ())
    with pytest.raises(StateError, match="tie_word_embeddings=False"):
        adapter.merge()


@every(mergeable)
def test_a_merged_adapter_and_an_active_one_add_up(case):
    """Both updates are taken from the original W0, whatever is merged."""
    model, _ = stirred(case, net(), name="one")
    stirred(case, model, name="another")
    x = batch()
    fs.activate(model, ["one", "another"])
    wanted = model(x)
    hosts.merge(model, {"one": 1.0})
    assert relative(model(x), wanted) <= 2e-6
