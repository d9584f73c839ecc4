"""Buffers that training moves belong to the adapter that moved them, whatever keeps them."""

import copy
import pickle

import pytest
import torch
from suite import bytes_of, same
from torch import nn

import finespun as fs
from finespun import files, hosts
from finespun.errors import FileError, StateError


class Average(nn.Module):
    """Keeps an average of what it was given, by a buffer that it replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.count += 1
        return x - self.mean


KINDS = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "batch norm alone": lambda: nn.BatchNorm1d(8, affine=False, momentum=None),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (8, 1)),
        nn.Upsample(scale_factor=2),
        nn.InstanceNorm1d(8, track_running_stats=True),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    ),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "average": Average,
}


class Moving(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.up, self.inner, self.head = nn.Linear(6, 8), KINDS[kind](), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.head(self.inner(self.up(x))) + 0.1 * self.seen


def moving(kind="batch norm"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Moving(kind).eval()


def learn(model, adapter, steps=3):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(adapter.parameters(), 0.05)
    model.train()
    for _ in range(steps):
        model(torch.randn(16, 6) + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return model(torch.ones(2, 6)).detach()


def base_is_there(model, plain):
    own = model.state_dict()
    return all(torch.equal(own[k], v) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_goes_with_its_adapter(kind, tmp_path):
    model, plain, x = moving(kind), moving(kind), torch.ones(2, 6)
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["up"], ())
    y = learn(model, adapter)
    assert not base_is_there(model, plain)
    with adapter.disabled():
        assert base_is_there(model, plain)
        assert torch.equal(model(x), plain(x))
        model.train()
        model(torch.randn(4, 6))
        model.eval()
    assert torch.equal(model(x), y)
    fs.activate(model, None)
    assert base_is_there(model, plain)
    assert torch.equal(model(x), plain(x))
    adapter.activate()
    assert torch.equal(model(x), y)
    adapter.save(tmp_path / "a")
    other = moving(kind)
    loaded = fs.load(other, tmp_path / "a")
    assert torch.equal(other(x), y)
    loaded.detach()
    assert same(bytes_of(other), bytes_of(plain))
    copies = [copy.deepcopy(model)]
    if kind != "spectral norm":  # torch pickles no parametrized module
        copies.append(pickle.loads(pickle.dumps(model)))
    for copied in copies:
        assert torch.equal(copied(x), y)
        fs.Adapter(copied, "default").detach()
        assert same(bytes_of(copied), bytes_of(plain))
    fs.activate(model, None)
    fs.evict(model, "default")
    adapter.activate()
    assert torch.equal(model(x), y)
    adapter.detach()
    assert same(bytes_of(model), bytes_of(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_a_baked_model_has_its_buffers(kind):
    model, plain = moving(kind), moving(kind)
    y = learn(model, adapter := fs.adapt(model, fs.LoRA(rank=2), ["up"], ()))
    adapter.bake()
    torch.testing.assert_close(model(torch.ones(2, 6)), y)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_two_that_moved_one_buffer_do_not_act_together():
    model, plain = moving(), moving()
    for name in "ab":
        learn(model, fs.adapt(model, fs.LoRA(rank=2), ["up"], (), name))
    fs.adapt(model, fs.LoRA(rank=2), ["up"], (), "c")
    before, y = bytes_of(model), model(torch.ones(2, 6))
    for call in (
        lambda: fs.activate(model, ["a", "b"]),
        lambda: fs.rows(model, ["a", "c"]).__enter__(),
        lambda: fs.rows(model, ["a", None]).__enter__(),
        lambda: fs.bake(model, ["a", "b"]),
    ):
        with pytest.raises(StateError):
            call()
        assert same(bytes_of(model), before)
        assert torch.equal(model(torch.ones(2, 6)), y)
    fs.activate(model, ["a", "c"])
    assert torch.equal(model.seen, torch.tensor(3.0))
    with fs.rows(model, ["b", "b"]):
        assert torch.equal(model.seen, torch.tensor(3.0))
    with fs.rows(model, ["c", None]):
        assert base_is_there(model, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_kept_aside_follows_the_model(dtype):
    model, plain = moving(), moving().to(dtype)
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["up"], ())
    learn(model, adapter)
    moved = {k: v.to(dtype) for k, v in model.state_dict().items() if "inner" in k}
    model.to(dtype)
    with adapter.disabled():
        assert base_is_there(model, plain)
        model.to(torch.float64)
    plain.to(torch.float64)
    own = model.state_dict()
    for key, value in moved.items():
        if value.is_floating_point():
            assert torch.equal(own[key], value.to(own[key])), key
    adapter.detach()
    assert same(bytes_of(model), bytes_of(plain))


@pytest.mark.parametrize("undo", ["memory", "entries"])
def test_what_a_merge_keeps_follows_the_model(undo):
    model, plain = moving(), moving().to(torch.bfloat16)
    adapter = fs.adapt(model, fs.make("shira", rank=1), ["up"], ())
    learn(model, adapter)
    adapter.merge(undo=undo)
    model.to(torch.bfloat16)
    with adapter.disabled():
        assert base_is_there(model, plain)
        model.to(torch.float32)
    adapter.unmerge()
    adapter.detach()
    assert same(bytes_of(model), bytes_of(plain.to(torch.float32)))


def test_a_model_whose_buffers_nothing_moves_saves_none():
    model = moving()
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["up"], ())
    model(torch.ones(2, 6)).sum().backward()
    assert not any(key.role == "buffer" for key in adapter.state().tensors)


@pytest.mark.parametrize("wrong", ["place", "shape"])
def test_a_file_with_a_buffer_that_does_not_fit_is_refused(wrong):
    model = moving()
    learn(model, adapter := fs.adapt(model, fs.LoRA(rank=2), ["up"], ()))
    state = adapter.state()
    other = moving()
    if wrong == "place":
        other.inner = nn.Identity()
    else:
        other.inner.running_mean = torch.zeros(9)
    before = bytes_of(other)
    with pytest.raises(FileError, match="buffer/inner/running_mean"):
        files.register_saved(other, files.Saved(state.named("x"), "", ()), force=True)
    assert same(bytes_of(other), before)
    assert "_finespun_adapters" not in other.__dict__


def test_swapping_takes_the_buffers_over():
    model, x = moving(), torch.ones(2, 6)
    one = fs.adapt(model, fs.LoRA(rank=2), ["up"], (), "one")
    start = one.state()
    y0, y = model(x), learn(model, one)
    moved = one.state()
    hosts.swap(model, "one", start)
    assert torch.equal(model(x), y0)
    hosts.swap(model, "one", moved)
    assert torch.equal(model(x), y)
