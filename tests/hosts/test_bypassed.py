"""Code that goes past a layer's forward: it is followed, refused or warned of, never silent."""

import copy

import pytest
import torch
import torch.nn.functional as F
from suite import CASES, batch, net, relative, stir, stirred, twin
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import finespun as fs
from finespun import hosts
from finespun.errors import StateError, TargetError

LORA = CASES[0]
STRUCTURES = {"lora": fs.LoRA(rank=2), "lsr": fs.LSR(rank=2, separation_rank=3)}
every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def effect(model, adapter, x):
    """How far the adapter moves the output."""
    with torch.no_grad():
        y = model(x)
        with adapter.disabled():
            return relative(y, model(x))


# --- torch's own attention ------------------------------------------------------------------------


class Encodes(nn.Module):
    """A module around torch's encoder and attention."""

    def __init__(self, batch_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.out = nn.Linear(8, 3)
        self.need_weights = True

    def forward(self, x, **options):
        h = self.encoder(x, **options)
        return self.out(self.attend(h, h, h, need_weights=self.need_weights)[0])


@pytest.mark.parametrize("name", ["linear1", "norm2", "self_attn", "self_attn.out_proj"])
def test_a_trained_copy_that_the_fast_path_would_ignore_is_refused(name):
    model = Encodes()
    with pytest.raises(TargetError, match=f"'encoder.layers.0.{name}'.*copy would do nothing"):
        fs.adapt(model, LORA.structure, ["out"], train_modules=[f"encoder.layers.0.{name}"])
    with pytest.raises(TargetError, match="copy would do nothing"):
        fs.adapt(model, LORA.structure, ["out"], train_modules=["attend.out_proj"])
    assert "_finespun_adapters" not in model.__dict__


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("whole", ["encoder.layers.0", "attend", "encoder"])
def test_a_whole_layer_of_torchs_encoder_may_be_trained(whole, need_weights, batch_first):
    torch.manual_seed(0)
    model, x = Encodes(batch_first).eval(), torch.randn(2, 5, 8)
    model.need_weights = need_weights
    with torch.no_grad():
        y0 = model(x)
    adapter = fs.adapt(model, LORA.structure, [], train_modules=[whole])
    stir(adapter.parameters())
    assert effect(model, adapter, x) > 1e-3
    trained = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained, atol=1e-5, rtol=1e-4)
        with adapter.disabled():
            assert torch.equal(model(x), y0)


@pytest.mark.parametrize("padded", [False, True])
def test_a_bypass_goes_around_torchs_encoder_layer_on_its_fast_path(padded):
    torch.manual_seed(0)
    model, x = Encodes().eval(), torch.randn(2, 5, 8)
    adapter = fs.adapt(model, fs.make("lor2c", rank=2), [r"encoder.layers.0"], train_modules=())
    stir(adapter.parameters())
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    slow = model.encoder(x.requires_grad_(), src_key_padding_mask=mask).detach()
    with torch.no_grad():
        fast = model.encoder(x, src_key_padding_mask=mask)
        with adapter.disabled():
            base = model.encoder(x, src_key_padding_mask=mask)
    seen = slice(None, 3 if padded else 5)
    torch.testing.assert_close(fast[:, seen], slow[:, seen], atol=1e-5, rtol=1e-4)
    assert relative(fast[:, seen], base[:, seen]) > 1e-3


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["attend"], "MultiheadAttention; what can be adapted"),
        (["attend:q"], "MultiheadAttention; what can be adapted"),
        (["attend.in_proj_weight"], r"bare parameter \(24, 8\)"),
        (["in_proj_weight:v"], r"bare parameter \(24, 8\)"),
        (["attend.out_proj"], "fast path reads the weight"),
        ("mlp", "'mlp' finds no layer: those in a .*fast path"),
    ],
)
def test_parts_of_torchs_attention_are_refused_by_name(target, message):
    with pytest.raises(TargetError, match=message):
        fs.adapt(Encodes(), fs.LoRA(rank=2), target, train_modules=())


def test_a_word_that_finds_nothing_says_what_is_there():
    with pytest.raises(TargetError, match="finds no such layer in this Sequential; it has Conv2d"):
        fs.adapt(nn.Sequential(nn.Conv2d(3, 4, 1)), fs.LoRA(rank=1), "all-linear")


# --- forwards on the object -----------------------------------------------------------------------


@every_structure
def test_a_forward_on_the_object_is_kept_inside(structure):
    model, x = two_layers(), torch.randn(3, 6)
    own = model[0].forward
    model[0].forward = lambda z: 2 * own(z)
    y0 = model(x)
    adapter = fs.adapt(model, structure, ["0"])
    assert torch.equal(model(x), y0)
    stir(adapter.parameters())
    delta = adapter.deltas["0"]
    wanted = model[2](torch.tanh(2 * own(x) + delta(x)))
    torch.testing.assert_close(model(x), wanted)
    with adapter.disabled():
        assert torch.equal(model(x), y0)
    adapter.detach()
    assert torch.equal(model(x), y0)
    assert type(model[0]) is nn.Linear


def test_a_forward_put_on_the_object_later_goes_with_the_adapter():
    model, x = two_layers(), torch.randn(3, 6)
    plain = copy.deepcopy(model)
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["0"])
    stir(adapter.parameters())
    y, own = model(x), model[0].forward
    model[0].forward = lambda z: own(z)
    assert torch.equal(model(x), y)
    adapter.detach()
    assert torch.equal(model(x), plain(x))


@every_structure
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_model_that_accelerate_dispatches_is_adapted(structure, moment):
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    def dispatch(model):
        return dispatch_model(
            model, {"0": "cpu", "1": "cpu", "2": "cpu"}, main_device="cpu", force_hooks=True
        )

    model, plain, x = two_layers(), two_layers(), torch.randn(3, 6)
    if moment == "before":
        dispatch(model)
    adapter = fs.adapt(model, structure, ["0", "2"])
    if moment == "after":
        dispatch(model)
    assert torch.equal(model(x), plain(x))
    stir(adapter.parameters())
    other = fs.adapt(plain, structure, ["0", "2"])
    other.attached.load(adapter.attached.tensors())
    assert relative(model(x), plain(x)) < 1e-6
    assert effect(model, adapter, x) > 1e-2
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert relative(copy.deepcopy(model)(x), plain(x)) < 1e-6
    adapter.detach()
    other.detach()
    assert torch.equal(model(x), plain(x))
    remove_hook_from_submodules(model)
    assert torch.equal(model(x), plain(x))


@every_structure
def test_an_offloaded_model_is_adapted_and_cannot_be_merged(structure):
    from accelerate import cpu_offload

    model, plain, x = two_layers(), two_layers(), torch.randn(3, 6)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].weight.is_meta
    adapter = fs.adapt(model, structure, ["0", "2"])
    assert {p.device.type for p in adapter.parameters()} == {"cpu"}
    assert torch.equal(model(x), plain(x))
    stir(adapter.parameters())
    other = fs.adapt(plain, structure, ["0", "2"])
    other.attached.load(adapter.attached.tensors())
    assert relative(model(x), plain(x)) < 1e-6
    with pytest.raises(StateError, match="'0' is offloaded"):
        adapter.merge()
    assert relative(model(x), plain(x)) < 1e-6
    with pytest.raises(StateError, match="'0' is offloaded"):
        fs.adapt(model, fs.make("dora", rank=2), ["0"], name="dora")


@every_structure
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_code_after_a_layer_may_write_into_its_output(structure, shape):
    """Wav2Vec2 masks the output of its projection so."""
    model, x = two_layers(), torch.randn(shape)
    adapter = fs.adapt(model, structure, ["0"])
    stir(adapter.parameters())
    y = model[0](x)
    y[..., 1] = 0.0
    got = torch.autograd.grad(y.square().sum(), adapter.parameters())
    kept = torch.ones(8).index_fill(0, torch.tensor([1]), 0.0)
    wanted = torch.autograd.grad((model[0](x) * kept).square().sum(), adapter.parameters())
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)


# --- weights that are made, and wrappers ----------------------------------------------------------


def pruned():
    layer = nn.Linear(6, 4)
    prune.random_unstructured(layer, "weight", amount=0.5)
    return layer


MADE = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(6, 4, 1)),
    "pruned": pruned,
}


@pytest.mark.parametrize("made", [*MADE.values(), lambda: weight_norm(nn.Linear(6, 4))],
                         ids=[*MADE, "weight_norm of old"])  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_is_refused(made):
    """Merging would write into a tensor that the next forward pass throws away."""
    model = nn.ModuleDict({"layer": made()})
    with pytest.raises(TargetError, match="'layer' computes its weight anew"):
        fs.adapt(model, fs.LoRA(rank=2), ["layer"])


def test_a_weight_made_a_parameter_again_can_be_adapted():
    model, x = nn.ModuleDict({"layer": MADE["weight_norm"]()}), torch.randn(3, 6)
    parametrize.remove_parametrizations(model["layer"], "weight")
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["layer"])
    stir(adapter.parameters())
    y = model["layer"](x)
    adapter.merge()
    torch.testing.assert_close(model["layer"](x), y)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_model_that_is_wrapped_already_is_refused(wrap):
    """Its new parameters would be strangers to the wrapper, and named after it."""
    model = wrap(two_layers())
    with pytest.raises(StateError, match=r"the model is wrapped by .* already"):
        fs.adapt(model, fs.LoRA(rank=2), ["0"])
    assert "_finespun_adapters" not in model.__dict__


def test_a_module_inside_an_adapted_one_is_not_adapted_apart():
    model = net()
    inner = fs.adapt(model.blocks[0], fs.LoRA(rank=2), ["up"], train_modules=())
    with pytest.raises(TargetError, match=r"'blocks.0.up' is adapted already, as 'up' of a module"):
        fs.adapt(model, fs.LoRA(rank=2), ["up"], train_modules=(), name="outer")
    assert "_finespun_adapters" not in model.__dict__
    inner.detach()
    fs.adapt(model, fs.LoRA(rank=2), ["up"], train_modules=(), name="outer")
    with pytest.raises(TargetError, match="'up' is adapted already"):
        fs.adapt(model.blocks[0], fs.LoRA(rank=2), ["up"], train_modules=())


# --- weights that are read ------------------------------------------------------------------------


class Reads(nn.Module):
    """Multiplies by the weight of its head, as fused losses do, unless told to call it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)
        self.calls, self.skipped = False, (1,)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x if i in self.skipped else torch.tanh(layer(x))
        return self.head(x) if self.calls else F.linear(x, self.head.weight, self.head.bias)


@pytest.mark.parametrize("how", ["target", "trained"])
def test_a_layer_whose_weight_is_read_is_warned_of_once(how):
    model, x = Reads(), torch.randn(2, 6)
    named = {"targets": ["layers.0", "layers.1", "head"], "train": ()}
    if how == "trained":
        named = {"targets": ["layers.0", "layers.1"], "train": ["head"]}
    fs.adapt(model, fs.LoRA(rank=2), **named)
    with torch.no_grad():
        model(x)
    with pytest.warns(UserWarning, match="'default' acts at 'head', which this model did not call"):
        model.train()(x)
    model(x)


def test_a_layer_that_rests_is_not_warned_of():
    model, x = Reads(), torch.randn(2, 6)
    model.calls = True
    fs.adapt(model, fs.LoRA(rank=2), ["layers.0", "layers.1", "head"], train_modules=())
    model.train()(x)
    model = Reads().eval()
    fs.adapt(model, fs.LoRA(rank=2), ["head"], train_modules=())
    model(x)


# --- copies ---------------------------------------------------------------------------------------


def test_a_copy_of_a_delta_does_not_copy_the_model():
    model, adapter = stirred(LORA, net())
    name, delta = next(iter(adapter.deltas.items()))
    alone = copy.deepcopy(delta)
    assert alone.site is delta.site
    assert all(d.site.layer is hosts.hosts_of(model)[n].layer
               for n, d in copy.deepcopy(adapter.deltas).items())  # fmt: skip
    x, before = batch(), delta(torch.ones(24)).detach()
    with torch.no_grad():
        alone.A.zero_()
    assert torch.equal(delta(torch.ones(24)), before)
    other = copy.deepcopy(model)
    theirs = fs.Adapter(other, "default").deltas[name]
    assert theirs.site.layer is other.get_submodule(name)
    assert theirs.site.adapter_set is hosts.adapter_set_of(other) is not hosts.adapter_set_of(model)
    assert torch.equal(twin(model)(x), model(x))
