"""Adapters without a model: what they hold in common, what a thousand cost, what sleep keeps."""

import dataclasses
import gc
import pickle
import tracemalloc

import pytest
import torch
from suite import CASES, batch, every, net, stir, stirred
from torch import nn

import finespun as fs
from finespun import files, hosts
from finespun.adapters.keys import Key
from finespun.adapters.packed import PackedTensors
from finespun.adapters.state import AdapterState, Form
from finespun.contract import Plan, SiteShape
from finespun.errors import InputError
from finespun.methods.structures import STRUCTURES

BY_NAME = {case.name: case for case in CASES}


def plain_model(width=96, layers=4):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def folder_of(tmp_path, rank, dtype=torch.float32):
    """An adapter on disk in this dtype, with the lineage that a run writes."""
    model = plain_model()
    adapter = fs.adapt(model, fs.LoRA(rank=rank), "all-linear", [], name="first")
    stir(adapter.parameters())
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(dtype)
    recipe = "model: m\n" + "\n".join(f"key_{i}: value" for i in range(60))
    lineage = files.lineage_of(adapter.structure, recipe, {"accuracy": 0.5}, {"data": 3})
    adapter.save(tmp_path / "a", lineage)
    return tmp_path / "a"


def stored(folder):
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def packed(model):
    """Bytes of the tensors of all registered states."""
    states = hosts.adapter_set_of(model).states.values()
    held = [s.tensors.data.untyped_storage() for s in states]
    return sum({s.data_ptr(): s.nbytes() for s in held}.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rank"),
    [(torch.float32, 8), pytest.param(torch.bfloat16, 16, marks=pytest.mark.full)],
)
def test_a_thousand_small_adapters_cost_what_their_tensors_do(tmp_path, dtype, rank):
    folder, count = folder_of(tmp_path, rank, dtype), 1000
    assert 20_000 < stored(folder) < 30_000
    model = plain_model()
    files.register_saved(model, files.read_adapter(folder).named("warm"))
    gc.collect()
    tracemalloc.start()
    try:
        for i in range(count):
            files.register_saved(model, files.read_adapter(folder).named(f"a{i}"))
        for i in range(0, count, 100):
            fs.activate(model, f"a{i}")
        fs.activate(model, None)
        for i in range(0, count, 100):
            fs.evict(model, f"a{i}")
        gc.collect()
        objects = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert objects + packed(model) <= 1.1 * (count + 1) * stored(folder)
    states = hosts.adapter_set_of(model).states.values()
    assert len({id(s.form) for s in states}) == len({id(s.base) for s in states}) == 1
    assert {t.dtype for s in states for t in s.tensors.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_that_was_not_trained_sleeps_as_the_bytes_it_was(tmp_path, dtype):
    folder = folder_of(tmp_path, 4, dtype)
    model = plain_model()
    fs.load(model, folder, name="x")
    before = hosts.adapter_set_of(model).states["x"]
    fs.activate(model, None)
    fs.Adapter(model, "x").scale = 0.5
    fs.evict(model, "x")
    after = hosts.adapter_set_of(model).states["x"]
    assert after.tensors is before.tensors
    assert after.strength == 0.5


def test_what_was_trained_sleeps_in_the_dtype_of_its_file(tmp_path):
    folder = folder_of(tmp_path, 4, torch.bfloat16)
    model = plain_model()
    adapter = fs.load(model, folder, name="x", trainable=True)
    stir(adapter.parameters(), seed=7)
    wanted = {k: t.clone() for k, t in adapter.attached.tensors().items()}
    x = torch.randn(3, 96)
    fs.activate(model, None)
    fs.evict(model, "x")
    state = hosts.adapter_set_of(model).states["x"]
    assert state.tensors.keys() == wanted.keys()
    for key, tensor in state.tensors.items():
        assert torch.equal(tensor, wanted[key].bfloat16())
    fs.activate(model, "x")
    assert not torch.equal(model(x), plain_model()(x))


@every()
def test_a_snapshot_is_left_alone_by_training_and_a_lent_state_is_not(case):
    STRUCTURES[case.structure.kind] = type(case.structure)
    _, adapter = stirred(case, net(), ("head",))
    lent, taken = adapter.attached.lent(), adapter.state()
    assert taken.form is adapter.state().form
    before = {key: tensor.clone() for key, tensor in taken.tensors.items()}
    stir(adapter.parameters(), seed=11)
    assert all(torch.equal(taken.tensors[key], tensor) for key, tensor in before.items())
    live = adapter.attached.tensors()
    assert all(t.data_ptr() == live[key].data_ptr() for key, t in lent.tensors.items())
    again = net()
    hosts.register(again, taken.named("again"))
    fs.activate(again, "again")
    held = fs.Adapter(again, "again").attached.tensors()
    assert all(torch.equal(held[key], tensor) for key, tensor in before.items())


def test_an_adapter_that_cannot_be_attached_sleeps_on_and_the_model_stays():
    _, adapter = stirred(BY_NAME["lora"], net(), ("head",))
    state = adapter.state()
    wrong = {k: torch.zeros(1) if k.name == "B" else t for k, t in state.tensors.items()}
    other = net()
    wanted, keys = other(batch()), list(other.state_dict())
    hosts.register(other, state.with_tensors(wrong).named("wrong"))
    with pytest.raises(InputError, match=r"is \(1,\), expected"):
        fs.activate(other, "wrong")
    assert torch.equal(other(batch()), wanted)
    assert list(other.state_dict()) == keys
    assert not hosts.adapter_set_of(other).attached
    hosts.remove(other, "wrong")
    assert "_finespun_hooks" not in other.__dict__


def test_equal_content_is_one_form():
    tensors = {Key("site", "a", "A"): torch.zeros(2, 3), Key("site", "a", "B"): torch.zeros(4, 2)}

    def form(rank=2, **options):
        plan = Plan((SiteShape("a", 4, 3),), {"a": {"rank": rank, "scale": 2.0}})
        return Form.of(fs.LoRA(rank=2, **options), plan, (), tensors)

    first = form()
    assert form() is first
    assert form(rank=1) is not first
    assert form(seed=1) is not first
    assert first.fits(form(dropout=0.5))
    assert not first.fits(form(rank=1))


def test_tensors_lie_in_one_buffer_and_states_are_pickled_whole():
    tensors = {
        Key("site", "a", "A"): torch.arange(3.0),
        Key("site", "a", "", "gate"): torch.ones(2),
    }
    packed = PackedTensors.pack(tensors)
    assert [slot.offset for slot in packed.table.values()] == [0, 16]
    assert len({t.untyped_storage().data_ptr() for t in packed.values()}) == 1
    state = AdapterState.pack("x", fs.LoRA(), Plan(()), tensors)
    again = pickle.loads(pickle.dumps(state))
    assert again.tensors.keys() == tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in tensors.items())
    assert state.num_parameters == 3
    assert dataclasses.replace(state, strength=2.0).tensors is state.tensors
