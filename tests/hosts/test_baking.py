"""bake: the adapter ends, the model computes the same and is plain again."""

import copy

import pytest
import torch
from shadow import Small, small
from suite import batch, bytes_of, every, mergeable, net, relative, same, stir, stirred, twin
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.errors import FinespunError, StateError


def plainly(model, plain):
    """Whether classes, keys and flags are those of a plain model."""
    return (
        [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        and model.state_dict().keys() == plain.state_dict().keys()
        and model.__dict__.keys() == plain.__dict__.keys()
        and all(p.requires_grad for p in model.parameters())
    )


@every(mergeable)
def test_a_baked_model_computes_the_same_and_is_plain(case):
    plain, x = net(), batch()
    model, adapter = stirred(case, twin(plain), ("head",))
    y = model(x)
    assert adapter.bake() is model
    assert relative(model(x), y) <= 2e-6
    assert plainly(model, plain)
    fs.adapt(model, fs.LoRA(rank=2), case.targets if not case.block else "all-linear")
    assert relative(model(x), y) <= 2e-6


@every(lambda case: not mergeable(case))
def test_what_cannot_be_baked_is_refused_with_nothing_changed(case):
    model, adapter = stirred(case, net(), ("head",))
    before, y = bytes_of(model), model(batch())
    with pytest.raises(StateError, match="cannot be merged"):
        adapter.bake()
    assert same(bytes_of(model), before)
    assert torch.equal(model(batch()), y)


@pytest.mark.parametrize("weights", [["a", "b"], {"a": 0.5, "b": -0.25}, None])
def test_several_adapters_are_baked_with_their_weights(weights):
    model, x = small(), torch.randn(5, 6)
    for name in "ab":
        stir(fs.adapt(model, fs.LoRA(rank=2), ["up", "down"], (), name).parameters(), ord(name))
    fs.activate(model, {"a": 0.5, "b": -0.25})
    wanted = model(x)
    fs.bake(model, weights)
    assert relative(model(x), wanted) < 1e-6
    assert plainly(model, small())


@pytest.mark.parametrize("undo", ["memory", "entries", "none"])
def test_what_is_merged_is_baked(undo):
    model, x = small(), torch.randn(5, 6)
    adapter = fs.adapt(model, fs.make("shira", rank=2), ["up", "down"], ["head"])
    stir(adapter.parameters())
    adapter.merge(undo=undo)
    y = model(x)
    adapter.bake()
    assert relative(model(x), y) < 1e-6
    assert plainly(model, small())


def test_others_are_not_left_on_another_base():
    model = small()
    one = fs.adapt(model, fs.LoRA(rank=2), ["up"], (), "one")
    fs.adapt(model, fs.LoRA(rank=2), ["up"], (), "other")
    with pytest.raises(StateError, match="other would stand on another base"):
        one.bake()
    fs.Adapter(model, "other").detach()
    assert plainly(one.bake(), small())


class Kinds(nn.Module):
    """Modules that can be trained whole, of several classes, with statistics among them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.chain = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Tanh()))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.chain(self.up(x))))


WHOLE = ["chain", "norm", "head", "chain.0", "chain.2"]


def kinds(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Kinds().to(dtype).eval()


def learn(model, parameters, steps=3, lr=0.05):
    """Steps of Adam in train mode."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(parameters, lr)
    model.train()
    for _ in range(steps):
        x = torch.randn(16, 6, dtype=model.up.weight.dtype) + 1
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", WHOLE)
def test_any_module_is_trained_whole_and_goes_out_and_in(whole, dtype, tmp_path):
    model, plain, x = kinds(dtype), kinds(dtype), torch.randn(5, 6).to(dtype)
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["up"], [whole])
    learn(model, adapter.parameters())
    y = model(x)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert not torch.equal(y, plain(x))
    with adapter.disabled():
        assert torch.equal(model(x), plain(x))
    adapter.save(tmp_path / "a")
    other = kinds(dtype)
    fs.load(other, tmp_path / "a")
    assert torch.equal(other(x), y)
    baked = copy.deepcopy(model)
    fs.Adapter(baked, "default").bake()
    assert relative(baked(x), y) < {4: 1e-6, 2: 5e-2}[dtype.itemsize]
    assert plainly(baked, plain)
    assert {p.dtype for p in baked.parameters()} == {dtype}
    adapter.detach()
    assert same(bytes_of(model), bytes_of(plain))


@pytest.mark.parametrize("bound", ["head", "table"])
def test_a_trained_copy_of_a_shared_weight_is_not_baked(bound):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model = Tied()
    adapter = fs.adapt(model, fs.LoRA(rank=2), [], [bound])
    before = bytes_of(model)
    with pytest.raises(StateError, match="untie them"):
        adapter.bake()
    assert same(bytes_of(model), before)


@pytest.mark.parametrize("each", ["own deltas", "one delta", "both"])
def test_uses_of_one_weight_are_merged_only_with_one_update(each):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model, ids = Tied(), torch.arange(11)
    targets = ["table", "head"] if each == "own deltas" else ["head"]
    adapter = fs.adapt(model, fs.LoRA(rank=2), targets, (), tie="both" if each == "both" else None)
    stir(adapter.parameters())
    y, before = model(ids), bytes_of(model)
    if each != "both":
        with pytest.raises(StateError, match="shares its weight"):
            adapter.merge()
        assert same(bytes_of(model), before)
        assert torch.equal(model(ids), y)
        return
    adapter.bake()
    assert relative(model(ids), y) < 1e-5
    assert model.head.weight is model.table.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("undo", ["memory", "entries", "none"])
def test_what_is_no_number_is_not_merged(undo, value):
    model = small()
    adapter = fs.adapt(model, fs.make("shira", rank=2), ["up", "down"], ())
    with torch.no_grad():
        adapter.parameters()[-1][-1] = value
    base = bytes_of(model)
    for work in (lambda: adapter.merge(undo=undo), adapter.bake):
        with pytest.raises(StateError, match="NaN or infinity"):
            work()
        kept = {k: v for k, v in bytes_of(model).items() if "deltas" not in k}
        assert same(kept, {k: v for k, v in base.items() if "deltas" not in k})


class Saver(Small):
    """A model with a `save_pretrained` of its own kind."""

    def save_pretrained(self, folder, state_dict=None):
        self.written = dict(state_dict or self.state_dict())


@pytest.mark.parametrize("merged", [True, False])
def test_save_pretrained_has_plain_keys_or_says_what_is_missing(merged):
    torch.manual_seed(1)
    model = Saver().eval()
    plain, x = copy.deepcopy(model), torch.randn(5, 6)
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["up", "down"], ["head"])
    stir(adapter.parameters())
    y = model(x)
    if merged:
        adapter.merge()
        model.save_pretrained("here")
    else:
        with pytest.warns(UserWarning, match="without 'default'"):
            model.save_pretrained("here")
    fresh = Saver().eval()
    fresh.load_state_dict(model.written)
    assert relative(fresh(x), y if merged else plain(x)) < 1e-6
    assert model.written.keys() == plain.state_dict().keys()
    assert "state_dict" not in model.__dict__
    if merged:
        adapter.unmerge()
    adapter.detach()
    del model.written
    assert plainly(model, plain)


@pytest.mark.parametrize("end", ["detach", "bake"])
def test_a_merge_for_good_has_lawful_ends(end):
    model, x = small(), torch.randn(5, 6)
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["up", "down"], ())
    stir(adapter.parameters())
    y = model(x)
    adapter.merge(undo="none")
    for refused in (adapter.unmerge, adapter.merge, adapter.disabled().__enter__):
        with pytest.raises(FinespunError, match="undo='none'"):
            refused()
    getattr(adapter, end)()
    assert relative(model(x), y) < 1e-6
    assert plainly(model, small())
    other = fs.adapt(model, fs.LoRA(rank=2), ["up"], ())
    with other.disabled():
        assert relative(model(x), y) < 1e-6


def test_adapters_of_one_module_are_baked_one_by_one():
    model = small()
    for name in "ab":
        fs.adapt(model, fs.LoRA(rank=2), ["up"], ["head"], name)
    before = bytes_of(model)
    with pytest.raises(StateError, match="each have their own 'head'"):
        hosts.bake(model, ["a", "b"])
    assert same(bytes_of(model), before)
