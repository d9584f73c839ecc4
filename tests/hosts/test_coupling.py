"""Layers that share hidden features: who they are, and moving their units together."""

import copy
import json

import pytest
import tiny
import torch
from suite import bytes_of, relative, same, stir
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.contract import Coupling
from finespun.errors import FileError, StateError
from finespun.hosts.coupling import family
from finespun.hosts.gathering import reorder
from finespun.methods.structures import S2FT

PROJECTIONS = ["q_proj", "k_proj", "v_proj"]
GATED = [*PROJECTIONS, "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv:q", "qkv:k", "qkv:v", "attn.proj", "fc1", "fc2"]
BERTS = ["query", "key", "value", "output.dense", "intermediate.dense"]
KNOWN = {  # family -> layers that share hidden features
    "llama": GATED,
    "roberta": BERTS,
    "timm vit": FUSED,
    "gpt2": ["c_attn:q", "c_attn:k", "c_attn:v", "c_proj", "c_fc"],
    "qwen2": GATED,
    "qwen3": GATED,
    "mistral": GATED,
    "bert": BERTS,
    "vit": [*PROJECTIONS, "o_proj", "fc1", "fc2"],
    "clip": [*PROJECTIONS, "out_proj", "fc1", "fc2"],
    "whisper": [*PROJECTIONS, "out_proj", "fc1", "fc2"],
    "deberta": ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"],
}
each = pytest.mark.parametrize("name", KNOWN)


def model_of(name):
    """The family's tiny model, every parameter moved, biases that start at zero too; of four heads,
    in two groups where these share keys and values."""
    model = tiny.built(name)
    if KNOWN[name] is GATED:
        config = copy.deepcopy(model.config)
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 6
        torch.manual_seed(0)
        model = type(model)(config).eval()
    stir([p for p in model.parameters() if p.dim()])
    return model


@torch.no_grad()
def output(name, model):
    return tiny.FAMILIES[name].call(model)


def adapted(name, model, **options):
    form = S2FT(**{"heads": 0.5, "channels": 0.1, **options})
    adapter = fs.adapt(model, form, KNOWN[name], ())
    stir(adapter.parameters())
    return adapter


# --- who shares what -----------------------------------------------------------------------------
def shares(name, model=None):
    """Site of the first block -> (side, units, kind, parts)."""
    model = model or model_of(name)
    found = hosts.sites(model, hosts.find(model, KNOWN[name], layers=[0]), S2FT())
    return {n.rsplit(".layers.0.", 1)[-1]: h.coupling for n, h in found.items()}


def test_llamas_heads_and_channels():
    found = shares("llama")
    heads, channels = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert {n.rsplit(".", 1)[-1]: c for n, c in found.items()} == {
        "q_proj": Coupling(heads, "out", 2, "heads", 2),
        "k_proj": Coupling(heads, "out", 2, "heads", 1),
        "v_proj": Coupling(heads, "out", 2, "heads", 1),
        "o_proj": Coupling(heads, "in", 2, "heads", 2),
        "gate_proj": Coupling(channels, "out", 40),
        "up_proj": Coupling(channels, "out", 40),
        "down_proj": Coupling(channels, "in", 40),
    }


@each
def test_every_layer_of_a_block_is_known(name):
    """Writers out, readers in, as many units in all layers of a block."""
    blocks = {}
    for coupling in shares(name).values():
        blocks.setdefault(coupling.name, set()).add(coupling)
    for block in blocks.values():
        assert {c.side for c in block} == {"in", "out"}
        assert len({(c.units, c.kind) for c in block}) == 1
        assert all(c.units > 1 for c in block)


@each
def test_writers_train_rows_and_readers_columns(name):
    """The official timing code has the two the other way round."""
    adapter = fs.adapt(model_of(name), S2FT(heads=0.5, channels=0.1), KNOWN[name], ())
    for site, delta in adapter.deltas.items():
        changed = delta.sparse()[0] // delta.site.shape.in_features
        rows = len(changed.unique())
        writes = delta.site.coupling.side == "out"
        assert rows == (len(delta.lines) if writes else delta.site.shape.out_features), site


def test_what_is_not_known_shares_nothing():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    assert hosts.sites(model, ["0"], S2FT())["0"].coupling is None
    packed = nn.ModuleDict({"fc1": nn.Linear(6, 16), "fc2": nn.Linear(8, 6)})  # gate and value
    assert hosts.sites(packed, ["fc1"], S2FT())["fc1"].coupling is None
    assert family({"a.o": nn.Linear(2, 2)}, "a.o") is None


# --- moving units --------------------------------------------------------------------------------
@each
def test_gathering_changes_nothing_and_leaves_no_trace(name):
    """Heads and channels move in all layers of a block, biases included; then all stands again."""
    model = model_of(name)
    plain, before = output(name, model), bytes_of(model)
    adapter = fs.adapt(model, S2FT(heads=0.5, channels=0.1), KNOWN[name], ())
    weights = {n: p for n, p in model.named_parameters() if n in before}
    away = {n for n, d in adapter.deltas.items() if d.lines.tolist() != list(range(len(d.lines)))}
    with hosts.gathered(model, "default"):
        assert relative(output(name, model), plain) <= 1e-5
        moved = {n for n, p in weights.items() if not torch.equal(p, before[n])}
        for delta in adapter.deltas.values():
            assert delta.lines.tolist() == list(range(len(delta.lines)))
    names = {n.partition(":")[0] for n in away}
    assert {f"{n}.weight" for n in names} <= moved
    assert moved <= {f"{n}.{k}" for n in names for k in ("weight", "bias")}
    assert len({family(hosts.modules(model), n).block for n in away}) > 2
    stir(adapter.parameters())
    changed = output(name, model)
    assert relative(changed, plain) > 1e-3
    with hosts.gathered(model, "default"):
        assert relative(output(name, model), changed) <= 1e-5
    assert torch.equal(output(name, model), changed)
    adapter.detach()
    assert same(bytes_of(model), before)


def test_biases_move_with_their_rows():
    """The official conversion leaves biases behind, and RoBERTa computes something else."""
    model = model_of("roberta")
    adapter = adapted("roberta", model)
    y, layer = output("roberta", model), model.roberta.encoder.layer[0].intermediate.dense
    lines, bias = adapter.deltas["roberta.encoder.layer.0.intermediate.dense"].lines, layer.bias
    before = bias.detach().clone()
    with hosts.gathered(model, "default"):
        assert torch.equal(bias[: len(lines)], before[lines])
        bias.data.copy_(before)
        assert relative(output("roberta", model), y) > 1e-4


def test_heads_of_one_group_may_change_places():
    """Query heads with the same keys and values, and their columns of the output."""
    model = model_of("llama")
    y, attention = output("llama", model), model.model.layers[1].self_attn
    order = torch.tensor([1, 0, 3, 2])
    reorder(attention.q_proj.weight.data, 0, order)
    reorder(attention.o_proj.weight.data, 1, order)
    assert relative(output("llama", model), y) <= 1e-5
    across = torch.tensor([2, 1, 0, 3])
    reorder(attention.q_proj.weight.data, 0, across)
    reorder(attention.o_proj.weight.data, 1, across)
    assert relative(output("llama", model), y) > 1e-3


def test_grouped_heads_move_with_all_that_hangs_on_them():
    """The official code reshapes queries by key-value heads: with groups it mixes heads up."""
    model = model_of("llama")
    y, attention = output("llama", model), model.model.layers[0].self_attn
    order = torch.tensor([1, 0])
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        reorder(layer.weight.data, 0, order)
    assert relative(output("llama", model), y) > 1e-3
    reorder(attention.o_proj.weight.data, 1, order)
    assert relative(output("llama", model), y) <= 1e-5


def steps(name, model, adapter, count=5):
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        tiny.FAMILIES[name].call(model).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["llama", "timm vit"])
def test_training_gathered_is_training(name):
    """And the merged weights are the base's, in their own order, plus the slices."""
    base, trained = model_of(name), {}
    for gather in (False, True):
        model = copy.deepcopy(base)
        adapter = adapted(name, model)
        if gather:
            with hosts.gathered(model, "default"):
                steps(name, model, adapter)
        else:
            steps(name, model, adapter)
        trained[gather] = [p.detach().clone() for p in adapter.parameters()]
    for a, b in zip(*trained.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    wanted = {n: bytes_of(base)[f"{n.partition(':')[0]}.weight"] for n in adapter.deltas}
    adapter.merge()
    for site, delta in adapter.deltas.items():
        layer, _, part = site.partition(":")
        W, W0 = model.get_submodule(layer).weight, wanted[site]
        if part:
            W, W0 = (t.chunk(3)["qkv".index(part)] for t in (W, W0))
        torch.testing.assert_close(W, W0.index_add(delta.dim, delta.lines, delta.D.detach()))


def test_an_error_inside_puts_everything_back():
    model = model_of("llama")
    adapter = adapted("llama", model)
    before, lines = bytes_of(model), [d.lines.tolist() for d in adapter.deltas.values()]
    with pytest.raises(RuntimeError, match="stop"), hosts.gathered(model, "default"):
        raise RuntimeError("stop")
    assert same(bytes_of(model), before)
    assert [d.lines.tolist() for d in adapter.deltas.values()] == lines


def test_what_would_meet_moved_weights_is_refused(tmp_path):
    model = model_of("llama")
    adapter = adapted("llama", model)
    with hosts.gathered(model, "default"):
        for act in (
            lambda: adapter.save(tmp_path / "a"),
            lambda: adapter.export(tmp_path / "b"),
            adapter.merge,
            lambda: fs.adapt(model, fs.LoRA(rank=2), ["up_proj"], (), "other"),
        ):
            with pytest.raises(StateError, match="'default' are gathered: leave that block first"):
                act()
        with pytest.raises(StateError, match="'default'"), hosts.gathered(model, "default"):
            pass
    adapter.save(tmp_path / "a")
    fs.adapt(model, fs.LoRA(rank=2), ["up_proj"], (), "other")
    with pytest.raises(StateError, match="default, other"), hosts.gathered(model, "default"):
        pass


def refused(model, targets, match, form):
    adapter = fs.adapt(model, form, targets, ())
    before = bytes_of(model)
    with pytest.raises(StateError, match=match), hosts.gathered(model, "default"):
        pass
    assert same(bytes_of(model), before)
    adapter.detach()


def test_blocks_with_more_on_the_same_features_are_refused():
    """T5's position bias has a number for each head; a norm inside may have one for each channel;
    a shared weight is somebody else's too."""
    refused(
        tiny.built("t5"), ["SelfAttention.v", "SelfAttention.o"], r"relative_attention_bias", S2FT()
    )

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Linear(6, 20), nn.LayerNorm(20), nn.Linear(20, 6)

    refused(Normed(), ["fc2"], r"'norm.weight' \(20,\)", S2FT())
    shared = nn.ModuleDict({"fc1": nn.Linear(6, 20), "fc2": nn.Linear(20, 6)})
    shared["other"] = nn.Linear(6, 20)
    shared["other"].weight = shared["fc1"].weight
    refused(shared, ["fc2"], r"'fc1' shares", S2FT())
    refused(model_of("llama"), ["down_proj"], "chooses no units", fs.LoRA(rank=2))


def test_what_is_not_known_stays_in_its_place():
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6))
    adapter = fs.adapt(model, S2FT(channels=0.1), ["2"], ())
    before, lines = bytes_of(model), adapter.deltas["2"].lines
    with hosts.gathered(model, "default"):
        assert torch.equal(adapter.deltas["2"].lines, lines)
        assert same(bytes_of(model), before)


# --- the life of an adapter ----------------------------------------------------------------------
def test_ten_adapters_in_one_batch_are_ten_fused_models():
    """Each row gathers or scatters its own lines; overlapping choices do not disturb each other."""
    base, x = model_of("llama"), tiny.words(10)
    fused, names = [], [f"a{i}" for i in range(10)]
    model = copy.deepcopy(base)
    for i, name in enumerate(names):
        for m in (model, one := copy.deepcopy(base)):
            adapter = fs.adapt(m, S2FT(heads=0.25, channels=0.1, seed=i), GATED, (), name)
            stir(adapter.parameters(), seed=i)
        adapter.merge()
        fused.append(one(x[i : i + 1])[0].detach())
    with fs.rows(model, names), torch.no_grad():
        assert relative(model(x)[0], torch.cat(fused)) <= 1e-5
    chosen = [
        set(fs.Adapter(model, n).deltas["model.layers.0.mlp.down_proj"].lines.tolist())
        for n in names
    ]
    assert len(set.union(*chosen)) < sum(map(len, chosen))


@pytest.mark.parametrize("name", ["llama", "roberta", "timm vit", "gpt2"])
def test_saved_merged_and_back(name, tmp_path):
    """Another selection than the seed's (weights) is saved with the plan; merging is undone."""
    model = model_of(name)
    plain, before = copy.deepcopy(model), bytes_of(model)
    adapter = adapted(name, model, select="weight", per_layer=False)
    y = output(name, model)
    adapter.save(tmp_path)
    loaded = fs.load(plain, tmp_path)
    assert torch.equal(output(name, plain), y)
    assert loaded.num_update_parameters == adapter.structure.total_parameters(loaded.attached.plan)
    adapter.merge()
    assert relative(output(name, model), y) <= 1e-5
    adapter.unmerge()
    adapter.detach()
    assert same(bytes_of(model), before)


@pytest.mark.parametrize("wrong", [[40], [-1], [3, 1], [1, 1], [], ["1"]])
def test_a_file_with_units_that_are_none_is_refused(wrong, tmp_path):
    fs.adapt(model_of("llama"), S2FT(), ["down_proj"], ()).save(tmp_path)
    told = json.loads((tmp_path / "adapter.json").read_text())
    choices = told["plan"]["choices"]["model.layers.1.mlp.down_proj"]
    assert choices["of"] == 40
    choices["units"] = wrong
    (tmp_path / "adapter.json").write_text(json.dumps(told))
    with pytest.raises(FileError, match="adapter"):
        fs.load(model_of("llama"), tmp_path)
