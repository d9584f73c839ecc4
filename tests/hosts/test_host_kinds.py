"""Every kind of host: the update equals its dense form, merges, unmerges and detaches exactly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.errors import TargetError
from finespun.hosts.layers.slices import SliceHost


class Kinds(nn.Module):
    """One layer of each kind, in the order in which they can follow each other."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.table = nn.Embedding(30, 12, padding_idx=0)
        self.qkv = nn.Linear(12, 36)
        self.turned = Conv1D(24, 36)
        self.line = nn.Conv1d(24, 16, 3, padding=1)
        self.plane = nn.Conv2d(16, 8, (3, 1), stride=(2, 1), padding=(1, 0), padding_mode="reflect")
        self.point = nn.Conv2d(8, 12, 1)

    def forward(self, ids):
        h = self.turned(self.qkv(self.table(ids)))
        h = self.line(h.transpose(1, 2))
        return self.point(self.plane(h.unsqueeze(-1)))


TARGETS = {
    "embedding": ["table"],
    "conv1d of gpt-2": ["turned"],
    "convolution, one dimension": ["line"],
    "convolution, two dimensions": ["plane"],
    "convolution, 1x1": ["point"],
    "parts": ["qkv:q", "qkv:v"],
    "columns": ["qkv:3-10"],
    "all at once": ["table", "qkv:k", "turned", "line", "plane", "point"],
}


def stirred(structure, targets, seed=0):
    torch.manual_seed(seed)
    model = Kinds()
    plain = copy.deepcopy(model)
    adapter = fs.adapt(model, structure, targets)
    ids = torch.randint(0, 30, (2, 9))
    assert torch.equal(model(ids), plain(ids))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model, plain, adapter, ids


@pytest.mark.parametrize(
    "structure", [fs.LoRA(rank=2), fs.LSR(rank=2, separation_rank=3)], ids=["lora", "lsr"]
)
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_update_equals_its_dense_form(structure, targets):
    from transformers.pytorch_utils import Conv1D

    model, plain, adapter, ids = stirred(structure, targets)
    y = model(ids)
    wanted = copy.deepcopy(plain)
    for name, delta in adapter.deltas.items():
        layer = wanted.get_submodule(name.partition(":")[0])
        change = delta.dense(delta.base_weight()).detach()
        if isinstance(delta.site, SliceHost):
            layer.weight.data[delta.site.start : delta.site.end] += change
        elif isinstance(layer, (Conv1D, nn.Embedding)):
            layer.weight.data += change.T
        else:
            layer.weight.data += change.view_as(layer.weight)
    torch.testing.assert_close(y, wanted(ids), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(y, plain(ids), atol=1e-3)


@pytest.mark.parametrize("undo", ["memory", "none"])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_merge_and_unmerge(targets, undo):
    model, plain, adapter, ids = stirred(fs.LSR(rank=2, separation_rank=3), targets)
    y = model(ids)
    before = {n: (p.data_ptr(), p.clone()) for n, p in model.named_parameters()}
    adapter.merge(undo=undo)
    torch.testing.assert_close(model(ids), y, atol=2e-6, rtol=1e-5)
    if undo == "memory":
        with adapter.disabled():
            assert torch.equal(model(ids), plain(ids))
        adapter.unmerge()
        assert all(p.data_ptr() == before[n][0] for n, p in model.named_parameters())
        assert all(torch.equal(p, before[n][1]) for n, p in model.named_parameters())
        adapter.detach()
        assert torch.equal(model(ids), plain(ids))
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_rows_of_a_batch(targets):
    model, plain, _, ids = stirred(fs.LoRA(rank=2), targets)
    y = model(ids)
    with fs.rows(model, [None, "default"]):
        mixed = model(ids)
    torch.testing.assert_close(mixed[0], plain(ids)[0])
    torch.testing.assert_close(mixed[1], y[1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_gradients_are_those_of_the_dense_update(targets):
    model, _, adapter, ids = stirred(fs.LoRA(rank=2), targets)
    model.double()
    weight = torch.randn_like(model(ids))
    (model(ids) * weight).sum().backward()
    for delta in adapter.deltas.values():
        A, B = delta.A.detach(), delta.B.detach()
        step = 1e-6
        for p in (delta.A, delta.B):
            direction = torch.randn_like(p)
            with torch.no_grad():
                p.add_(step * direction)
                up = (model(ids) * weight).sum()
                p.sub_(2 * step * direction)
                down = (model(ids) * weight).sum()
                p.add_(step * direction)
            slope = float((up - down) / (2 * step))
            assert float((p.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-6)
        assert A.shape[0] == B.shape[1] == 2


def test_parts_of_gpt2_and_two_adapters_on_one_layer():
    from transformers import GPT2Config, GPT2Model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=50)).eval()
    ids = torch.randint(0, 50, (2, 5))
    y0 = model(ids).last_hidden_state
    a = fs.adapt(model, fs.LoRA(rank=2), ["c_attn:q", "c_attn:v"], name="a")
    b = fs.adapt(model, fs.LSR(rank=2, separation_rank=2), ["c_attn:v", "c_fc"], name="b")
    with torch.no_grad():
        for p in (*a.parameters(), *b.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    fs.activate(model, {"a": 1.0, "b": 0.5})
    both = model(ids).last_hidden_state
    hosts.merge(model, {"a": 1.0, "b": 0.5})
    torch.testing.assert_close(model(ids).last_hidden_state, both, atol=2e-6, rtol=1e-5)
    hosts.unmerge(model)
    b.detach()
    a.detach()
    assert torch.equal(model(ids).last_hidden_state, y0)
    assert type(model.h[0].attn.c_attn) is Conv1D


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qkv:x"], "no part 'x' of 36 outputs"),
        (["qkv:30-40"], "no part '30-40' of 36 outputs"),
        (["qkv:0-10", "qkv:9-12"], "overlap"),
        (["qkv", "qkv:q"], "adapted as a whole"),
        (["table:q"], "no plain linear layer"),
        (["tabel"], "nearest: 'table'"),
    ],
)
def test_wrong_parts_are_refused_and_nothing_stays(targets, message):
    model = Kinds()
    with pytest.raises(TargetError, match=message):
        fs.adapt(model, fs.LoRA(rank=2), targets)
    assert type(model.qkv) is nn.Linear
    assert type(model.table) is nn.Embedding
    assert "_finespun_adapters" not in model.__dict__


# Structures of every kind of path: factors, `through`, a map of the weight, entries, a moved bias.
PARTED = {
    "dora": {"rank": 2},
    "oft": {"block_size": 4},
    "ia3": {},
    "hira": {"rank": 2},
    "loha": {"rank": 2},
    "shira": {"rank": 1},
    "unilora": {"size": 40, "bound": 0.4},
}


@pytest.mark.parametrize("kind", PARTED)
def test_parts_take_every_kind_of_structure(kind):
    """A slice's base product was made for the whole layer: no structure may go around it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 36)), torch.randn(4, 5, 12)
    plain = copy.deepcopy(model)
    adapter = fs.adapt(model, fs.make(kind, **PARTED[kind]), ["0:q", "0:v"])
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn_like(p))
    wanted = copy.deepcopy(plain)
    for delta in adapter.deltas.values():
        columns = slice(delta.site.start, delta.site.end)
        wanted[0].weight.data[columns] += delta.dense(delta.base_weight()).detach()
        if (moved := delta.bias_change()) is not None:
            wanted[0].bias.data[columns] += moved.detach()
    y = model(x)
    torch.testing.assert_close(y, wanted(x), atol=2e-6, rtol=1e-5)
    with fs.rows(model, ["default", None, "default", None]):
        mixed = model(x)
    torch.testing.assert_close(mixed[::2], y[::2], atol=2e-6, rtol=1e-5)
    assert torch.equal(mixed[1::2], plain(x)[1::2])
    for undo in ("memory", "none"):
        adapter.merge(undo=undo)
        torch.testing.assert_close(model(x), y, atol=2e-6, rtol=1e-5)
        if undo == "memory":
            adapter.unmerge()
            assert torch.equal(model[0].weight, plain[0].weight)
            assert torch.equal(model[0].bias, plain[0].bias)


@pytest.mark.parametrize(
    "structure",
    [
        fs.make("fourierft", frequencies=9),
        fs.make("oft", block_size=6),
        fs.make("c3a", block_size=6),
    ],
    ids=lambda s: s.kind,
)
def test_a_dense_update_of_an_embedding_is_refused_with_its_size(structure):
    model = Kinds()
    with pytest.raises(TargetError, match="'table' its dense update would hold 360 parameters"):
        fs.adapt(model, structure, ["table"])
    assert "_finespun_adapters" not in model.__dict__


@pytest.mark.parametrize("kind", ["embedding", "convolution"])
def test_of_quantised_layers_only_linear_ones_are_adapted(kind):
    layer = {"embedding": nn.Embedding(9, 4), "convolution": nn.Conv2d(4, 4, 1)}[kind]
    grid = torch.ones(layer.weight.shape, dtype=torch.int8).as_subclass(Rounded)
    layer.weight = nn.Parameter(grid, requires_grad=False)
    with pytest.raises(TargetError, match="'0' is a quantised"):
        fs.adapt(nn.Sequential(layer), fs.LoRA(rank=2), ["0"])


def test_grouped_convolutions_and_renormalised_tables_are_refused():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Embedding(9, 4, max_norm=1.0))
    with pytest.raises(TargetError, match="4 groups"):
        fs.adapt(model, fs.LoRA(rank=2), ["0"])
    with pytest.raises(TargetError, match="max_norm"):
        fs.adapt(model, fs.LoRA(rank=2), ["1"])


def test_layer_whose_fast_path_skips_it_is_refused():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    for name in ("linear1", "self_attn.out_proj"):
        with pytest.raises(TargetError, match="would do nothing"):
            fs.adapt(model, fs.LoRA(rank=2), [name])


class Rounded(torch.Tensor):
    """A stand-in for a quantised weight: an int8 grid that only `dequantize` turns into floats."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor).float() * 0.01


class RoundedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.dequantize(), self.bias)


def test_quantised_base_trains_merges_to_float_and_comes_back():
    torch.manual_seed(0)
    layer = RoundedLinear(12, 20)
    grid = torch.randint(-128, 127, (20, 12), dtype=torch.int8).as_subclass(Rounded)
    layer.weight = nn.Parameter(grid, requires_grad=False)
    model, x = nn.Sequential(layer), torch.randn(3, 12)
    y0 = model(x)
    adapter = fs.adapt(model, fs.LSR(rank=2, separation_rank=3), ["0"])
    assert torch.equal(model(x), y0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn_like(p))
    y = model(x)
    stored = model[0].weight
    adapter.merge()
    assert model[0].weight.dtype == torch.float32
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    with adapter.disabled():
        assert torch.equal(model(x), y0)
    adapter.unmerge()
    assert model[0].weight is stored
    adapter.detach()
    assert torch.equal(model(x), y0)
