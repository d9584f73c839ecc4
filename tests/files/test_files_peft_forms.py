"""Everything PEFT's LoRA files hold, read and written: the two libraries compute the same."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from peft_both import by_peft, loaded, out, shapes, silence
from peft_folders import PREFIX, config, edit, fresh, gpt2, llama, logits, weights
from peft_kinds import CASES, IDS, KINDS, Kinds
from safetensors.torch import load_file, save_file
from suite import relative, stir
from torch import nn

import finespun as fs
from finespun.errors import BaseMismatch, FileError, InputError, TargetError


@pytest.mark.parametrize("name", CASES)
def test_peft_to_us_and_back(tmp_path, name):
    import peft

    theirs = by_peft(tmp_path / "theirs", Kinds().eval(), **CASES[name])
    model = Kinds().eval()
    adapter = loaded(model, tmp_path / "theirs")
    wanted = out(theirs)
    assert relative(out(model), wanted) < 1e-6
    assert relative(out(Kinds().eval()), wanted) > 1e-2
    with adapter.disabled():
        assert torch.equal(out(model), out(Kinds().eval()))

    adapter.export(tmp_path / "ours", portable=False)
    mixed = "fc" in CASES[name]["target_modules"]  # beside nn.Linear, whichever way it is said
    with warnings.catch_warnings() if mixed else silence():
        warnings.filterwarnings("ignore" if mixed else "error")
        again = peft.PeftModel.from_pretrained(Kinds().eval(), tmp_path / "ours").eval()
    assert relative(out(again), wanted) < 1e-6
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    again.save_pretrained(tmp_path / "back")
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "back")
    known = (peft.TrainableTokensConfig() if name == "table" else peft.LoraConfig()).to_dict()
    assert config(tmp_path / "ours").keys() <= known.keys()

    adapter.save(tmp_path / "native")
    for folder in ("ours", "native"):
        other = Kinds().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fs.load(other, tmp_path / folder)
        assert relative(out(other), wanted) < 1e-6


# --- written by every PEFT since 0.13 ----------------------------------------------------------
GOLDENS = Path(__file__).parent.parent / "goldens" / "peft"
FOLDERS = sorted(p.parent for p in GOLDENS.glob("*/*/adapter_config.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name} {f.name}")
def test_folders_of_every_peft_compute_what_it_recorded(folder):
    wanted = load_file(folder.parent / "outputs.safetensors")[folder.name]
    model = Kinds().eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fs.load(model, folder)
    assert relative(out(model), wanted) < 1e-6
    assert relative(out(Kinds().eval()), wanted) > 1e-2
    lost = folder.name == "own_bias" and folder.parent.name != "0.21"
    assert ["PEFT left them out" in str(w.message) for w in caught].count(True) == lost


def test_every_minor_version_is_there():
    assert {f.parent.name for f in FOLDERS} == {f"0.{n}" for n in range(13, 22)}


# --- real models -------------------------------------------------------------------------------
def both_ways(tmp_path: Path, make, **options) -> fs.Adapter:
    """PEFT to us to PEFT on a transformers model, nothing said by anybody."""
    import peft

    theirs = by_peft(tmp_path / "theirs", make(), **options)
    model = make()
    adapter = loaded(model, tmp_path / "theirs")
    wanted = logits(theirs)
    assert relative(logits(model), wanted) < 1e-6
    assert relative(logits(make()), wanted) > 1e-3
    adapter.export(tmp_path / "ours", portable=False)
    with silence():
        again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
        again.save_pretrained(tmp_path / "back", save_embedding_layers=False)
    assert relative(logits(again), wanted) < 1e-6
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "back")
    return adapter


def test_gpt2_whose_layers_are_conv1d(tmp_path):
    targets = ["c_attn", "mlp.c_proj"]
    both_ways(tmp_path, gpt2, target_modules=targets, fan_in_fan_out=True, use_dora=True)


def test_gpt2_with_every_bias(tmp_path):
    adapter = both_ways(tmp_path, gpt2, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    assert config(tmp_path / "ours")["bias"] == "all"
    assert {n.rpartition(".")[2] for n in adapter.attached.trained} == {"ln_1", "ln_2", "ln_f"}


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_act_at_both_uses_of_a_tied_table(tmp_path, tied):
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 11]}
    adapter = both_ways(tmp_path, lambda: llama(tied), **options)
    assert adapter.num_update_parameters == 2 * 2 * (24 + 24) + 3 * 24
    with torch.no_grad(), adapter.disabled():
        assert torch.equal(logits(adapter.model), logits(llama(tied)))
    wanted = logits(adapter.model)
    adapter.merge()
    assert relative(logits(adapter.model), wanted) < 1e-6


def test_weights_of_the_base_in_the_file_must_be_the_models(tmp_path):
    both_ways(tmp_path, partial(llama, tied=False), target_modules=["embed_tokens", "q_proj"])
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    held = weights(tmp_path / "theirs")
    assert key in held
    save_file({**held, key: held[key] + 1}, tmp_path / "theirs" / "adapter_model.safetensors")
    model = llama(tied=False)
    with pytest.raises(
        BaseMismatch, match=r"repeats the base's 'model.embed_tokens.weight', \(50, 24\)"
    ):
        fs.load(model, tmp_path / "theirs")
    assert "_finespun_adapters" not in model.__dict__
    with pytest.warns(UserWarning, match="repeats the base's"):
        fs.load(model, tmp_path / "theirs", force=True)


def test_resized_tables_that_peft_saves_on_its_own_are_the_adapters_own(tmp_path):
    import peft

    base = llama(tied=False)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    theirs.base_model.model.model.embed_tokens.weight.data += 0.1
    theirs.save_pretrained(tmp_path / "x", save_embedding_layers=True)
    model = llama(tied=False)
    adapter = loaded(model, tmp_path / "x")
    assert set(adapter.attached.trained) == {"model.embed_tokens", "lm_head"}
    assert relative(logits(model), logits(theirs)) < 1e-6
    assert relative(logits(llama(tied=False)), logits(theirs)) > 1e-3


# --- trained on ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_what_was_read_can_be_trained_on_as_in_peft(tmp_path, name):
    """The gradients of all trained parameters are PEFT's, DoRA's included."""
    import peft

    by_peft(tmp_path / "x", Kinds().eval(), **CASES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(Kinds(), tmp_path / "x", is_trainable=True).eval()
        adapter = fs.load(Kinds().eval(), tmp_path / "x", trainable=True)
    for model in (theirs, adapter.model):
        model(IDS).square().sum().backward()
    named = dict(theirs.base_model.model.named_parameters())
    compared = 0
    for site, delta in adapter.deltas.items():
        for key, number in delta.named_parameters():
            wanted = next(named[n] for n in _names(site, key) if n in named).grad
            given = number.grad.flatten(1) if number.dim() > 1 else number.grad
            assert relative(given, wanted.reshape(given.shape)) < 1e-5, (site, key)
            compared += 1
    assert compared == len([n for d in adapter.deltas.values() for n in d.parameters()]) > 0


def _names(site: str, key: str) -> list[str]:
    """What PEFT may call a number of ours."""
    return {
        "A": [f"{site}.lora_A.default.weight", f"{site}.lora_embedding_A.default"],
        "B": [f"{site}.lora_B.default.weight", f"{site}.lora_embedding_B.default"],
        "m": [f"{site}.lora_magnitude_vector.default.weight"],
        "b": [f"{site}.base_layer.bias", f"{site}.bias"],
        "values": [
            f"{site}.token_adapter.trainable_tokens_delta.default",
            f"{site}.trainable_tokens_delta.default",
        ],
    }[key]


@pytest.mark.parametrize("name", ["bias", "tokens", "dora", "table"])
def test_numbers_are_swapped_in_place(tmp_path, name):
    import peft

    by_peft(tmp_path / "a", Kinds().eval(), **CASES[name])
    theirs = peft.PeftModel.from_pretrained(Kinds().eval(), tmp_path / "a").eval()
    stir([p for n, p in theirs.named_parameters() if "lora_" in n or "tokens_delta" in n])
    theirs.save_pretrained(tmp_path / "b")
    adapter = loaded(Kinds().eval(), tmp_path / "a")
    before = [p.data_ptr() for p in adapter.parameters()]
    adapter.swap(tmp_path / "b")
    assert relative(out(adapter.model), out(theirs)) < 1e-6
    assert [p.data_ptr() for p in adapter.parameters()] == before


class Scaled(nn.Embedding):
    """A table that scales its rows, as those of Gemma and BART do."""

    def __init__(self, scale) -> None:
        super().__init__(11, 6)
        self.embed_scale = scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["kinds", "tokens"])
def test_tables_that_scale_their_rows(tmp_path, name, scale):
    def make() -> nn.Module:
        model = Kinds().eval()
        table = Scaled(scale)
        table.weight = model.embed.weight
        model.embed = table
        return model

    theirs = by_peft(tmp_path / "x", make(), **CASES[name])
    adapter = loaded(make(), tmp_path / "x")
    assert relative(out(adapter.model), out(theirs)) < 1e-6
    adapter.merge()
    assert relative(out(adapter.model), out(theirs)) < 1e-6


# --- made by us ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("structure", "targets"),
    [
        (fs.LSR(rank=2, separation_rank=2), ["embed", "up", "conv", "one"]),
        (fs.LoRA(rank=2), ["embed", "conv"]),
        (fs.make("dora", rank=2), ["up", "conv"]),
        (fs.make("tokens", tokens=(4, 1)), ["embed"]),
        (fs.make("ia3"), ["up"]),
    ],
    ids=["lsr", "lora", "dora", "tokens", "ia3"],
)
def test_our_adapters_in_pefts_own_form(tmp_path, structure, targets):
    import peft

    adapter = fresh(Kinds().eval(), structure, targets)
    wanted = out(adapter.model)
    done = adapter.export(
        tmp_path / "x", rank=8 if structure.kind == "ia3" else None, portable=False
    )
    assert done.error == 0
    assert "in PEFT's own form" in str(done)
    with silence():
        theirs = peft.PeftModel.from_pretrained(Kinds().eval(), tmp_path / "x").eval()
    assert relative(out(theirs), wanted) < 1e-6
    assert relative(out(Kinds().eval()), wanted) > 1e-3
    theirs.save_pretrained(tmp_path / "back")
    assert shapes(tmp_path / "x") == shapes(tmp_path / "back")


def test_strength_is_written_or_refused(tmp_path):
    import peft

    adapter = fresh(Kinds().eval(), fs.make("tokens", tokens=(4, 1)), ["embed"])
    adapter.scale = 0.3
    adapter.export(tmp_path / "x", portable=False)
    theirs = peft.PeftModel.from_pretrained(Kinds().eval(), tmp_path / "x").eval()
    assert relative(out(theirs), out(adapter.model)) < 1e-6
    dora = fresh(Kinds().eval(), fs.make("dora", rank=2), ["up"])
    with pytest.raises(InputError, match=r"keeps its rank; rank=2 does"):
        dora.export(tmp_path / "y", rank=1, portable=False)
    dora.scale = 0.3
    with pytest.raises(InputError, match=r"'up' is a DoRA of strength 0.3.*adapter.scale = 1.0"):
        dora.export(tmp_path / "y", portable=False)
    with pytest.raises(InputError, match="a portable LoRA holds linear layers only; portable=F"):
        adapter.export(tmp_path / "y")
    tied = fs.adapt(llama(), fs.LoRA(rank=2), ["lm_head"], tie="both")
    for portable in (True, False):
        with pytest.raises(InputError, match=r"'lm_head' acts at 'model.embed_tokens' too"):
            tied.export(tmp_path / "y", portable=portable)
    assert not (tmp_path / "y").exists()


# --- refused -------------------------------------------------------------------------------------
WRONG = {
    "too few rows": ("tokens", {"trainable_token_indices": {"embed": [1]}}, FileError, "names 1"),
    "twice": ("tokens", {"trainable_token_indices": {"embed": [1, 1]}}, FileError, "each once"),
    "far": (
        "tokens",
        {"trainable_token_indices": {"embed": [1, 11]}},
        FileError,
        "token 11 is not",
    ),
    "name": ("tokens", {"trainable_token_indices": {"x": [1]}}, FileError, "no tokens for 'embed'"),
    "text": ("tokens", {"trainable_token_indices": ["a"]}, FileError, "a list of row numbers"),
    "no list": ("table", {"token_indices": 3}, FileError, "a list of row numbers"),
    "unknown": ("table", {"r": 3}, FileError, "r=3 is unknown"),
    "no bias": ("bias", {"bias": "none"}, FileError, "neither lora_A nor lora_B"),
    "not DoRA": ("dora", {"use_dora": False}, FileError, "although use_dora is false"),
}


@pytest.mark.parametrize("name", WRONG)
def test_folders_at_odds_with_themselves_are_refused(tmp_path, name):
    case, changes, error, message = WRONG[name]
    by_peft(tmp_path / "x", Kinds(), **CASES[case])
    edit(tmp_path / "x", **changes)
    model = Kinds()
    with pytest.raises(error, match=message):
        fs.load(model, tmp_path / "x")
    assert "_finespun_adapters" not in model.__dict__


def test_biases_that_no_layer_of_the_model_has_are_refused(tmp_path):
    by_peft(tmp_path / "x", Kinds(), target_modules=["up"], bias="all")
    held = weights(tmp_path / "x")
    for name in ("nowhere", "embed"):
        more = {**held, f"{PREFIX}{name}.bias": torch.ones(6)}
        save_file(more, tmp_path / "x" / "adapter_model.safetensors")
        with pytest.raises((TargetError, FileError), match=repr(name)):
            fs.load(Kinds(), tmp_path / "x")


def test_magnitudes_under_their_older_and_newer_key_are_one(tmp_path):
    """PEFT's module holds them as lora_magnitude_vector.weight; its files leave .weight out."""
    by_peft(tmp_path / "x", Kinds().eval(), target_modules=KINDS, use_dora=True)
    first = Kinds().eval()
    loaded(first, tmp_path / "x")
    renamed = {
        k + ".weight" * k.endswith("magnitude_vector"): v
        for k, v in weights(tmp_path / "x").items()
    }
    save_file(renamed, tmp_path / "x" / "adapter_model.safetensors")
    second = Kinds().eval()
    loaded(second, tmp_path / "x")
    assert torch.equal(out(first), out(second))
