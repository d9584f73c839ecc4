"""Many adapters on one model: what the thousandth costs, and what switching costs."""

import sys
from collections import Counter

import pytest
import torch
from suite import stir
from tiny import DECODER, hugging, words
from torch.utils._python_dispatch import TorchDispatchMode

import finespun as fs
from finespun import files, hosts
from finespun.adapters.packed import PackedTensors

MOST_READS = 3  # of one tensor, while its adapter is registered


def llama(layers=2, width=64):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    torch.manual_seed(0)
    return hugging("LlamaForCausalLM", "LlamaConfig", **{**DECODER, **sizes})().eval()


@pytest.fixture
def folder(tmp_path):
    """An adapter of rank 8 on disk."""
    model = llama()
    adapter = fs.adapt(model, fs.LoRA(rank=8), "all-linear", name="first")
    stir(adapter.parameters())
    adapter.save(tmp_path / "first")
    return tmp_path / "first"


class Operators(TorchDispatchMode):
    """Counts the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls(work):
    """Calls of Python functions during `work()`: a measure that no other process disturbs."""
    count = 0

    def see(frame, event, arg):
        nonlocal count
        count += event == "call"

    work()  # caches are warm
    before = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def register(model, folder, name):
    return files.register_saved(model, files.read_adapter(folder).named(name))


def deep_size(thing, seen):
    """Bytes of a Python object and all that only it reaches; tensors by their storage."""
    if id(thing) in seen or isinstance(thing, (type, torch.dtype)):
        return 0
    seen.add(id(thing))
    size = sys.getsizeof(thing)
    if isinstance(thing, torch.Tensor):
        return size + thing.untyped_storage().nbytes()
    if isinstance(thing, dict):
        return size + sum(deep_size(k, seen) + deep_size(v, seen) for k, v in thing.items())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return size + sum(deep_size(v, seen) for v in thing)
    named = getattr(type(thing), "__slots__", ()) if not isinstance(thing, str) else ()
    size += sum(deep_size(getattr(thing, name), seen) for name in named if hasattr(thing, name))
    if hasattr(thing, "__dict__"):
        return size + deep_size(thing.__dict__, seen)
    return size


@pytest.mark.slow
@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_thousand_adapters_cost_their_files(folder, count):
    model = llama()
    on_disk = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    for i in range(count):
        register(model, folder, f"a{i}")
    states = hosts.adapter_set_of(model).states
    assert len(states) == count
    held = deep_size(states, {id(model)})
    assert held <= 1.1 * count * on_disk
    assert not hosts.hosts_of(model)
    fs.activate(model, f"a{count - 1}")
    assert len(hosts.hosts_of(model)) == 14


def test_registering_reads_no_tensor_more_often_the_more_adapters_there_are(folder, monkeypatch):
    model, counts, read = llama(), [], []
    inner = PackedTensors.__getitem__

    def seen(self, key):
        read.append(key)
        return inner(self, key)

    monkeypatch.setattr(PackedTensors, "__getitem__", seen)
    for i in range(8):
        read.clear()
        with Operators() as made:
            register(model, folder, f"a{i}")
        counts.append((len(read), made.count))
    tensors = len(hosts.adapter_set_of(model).states["a0"].tensors)
    assert counts[1:] == [counts[1]] * 7
    assert max(Counter(read).values(), default=0) <= MOST_READS
    assert len(read) <= MOST_READS * tensors


@pytest.mark.slow
def test_the_fortieth_adapter_costs_what_the_first_does(folder):
    model, costs = llama(), []
    for i in range(40):
        with Operators() as made:
            register(model, folder, f"a{i}")
            fs.activate(model, f"a{i}")
        costs.append(made.count)
    assert costs[39] == costs[1] <= costs[0]
    fresh = llama()
    register(fresh, folder, "x")
    number = iter(range(100))

    def add(target):
        name = f"b{next(number)}"
        register(target, folder, name)
        fs.activate(target, name)

    assert calls(lambda: add(model)) == pytest.approx(calls(lambda: add(fresh)), rel=0.05)


def switching(layers):
    """Attributes written, operators run and functions called by switching."""
    model = llama(layers, 16)
    for name in ("one", "two", "three"):
        adapter = fs.adapt(model, fs.LSR(rank=4, separation_rank=2), "all-linear", name=name)
        stir(adapter.parameters())
    adapter_set, written = hosts.adapter_set_of(model), []

    class Watched(type(adapter_set)):
        def __setattr__(self, name, value):
            written.append(name)
            super().__setattr__(name, value)

    adapter_set.__class__ = Watched
    with Operators() as made:
        fs.activate(model, "one")
        fs.activate(model, {"two": 0.5, "three": 0.5})
        fs.activate(model, None)
    switches = list(written)
    return switches, made.count, calls(lambda: fs.activate(model, "one"))


def test_switching_writes_one_attribute_however_many_layers():
    written, operators, called = switching(layers=1)
    assert written == ["owner", "active", "owner"] * 3  # no other thread may run the model
    assert operators == 0
    assert switching(layers=4) == (written, operators, called)


@pytest.mark.slow
def test_a_forward_pass_costs_the_same_however_many_adapters_sleep(folder):
    model, counts, number = llama(), [], iter(range(100))
    for more in (1, 19):
        for _ in range(more):
            name = f"a{next(number)}"
            register(model, folder, name)
            fs.activate(model, name)
        fs.activate(model, "a0")
        with torch.no_grad():
            model(words())
            with Operators() as made:
                model(words())
            counts.append((made.count, calls(lambda: model(words()))))
    assert counts[0] == counts[1]
