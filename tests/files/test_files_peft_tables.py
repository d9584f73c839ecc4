"""PEFT's other methods on `lm_head` and `embed_tokens`, whose own parameters PEFT saves along."""

import json
from pathlib import Path

import pytest
import torch
from peft_folders import PREFIX, gpt2, later, llama, logits, weights
from safetensors.torch import save_file
from suite import relative, stir
from torch import nn

import finespun as fs
from finespun.cli.app import run
from finespun.errors import BaseMismatch, FileError
from finespun.files import summarise
from finespun.files.peft.table import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

HEAD, TABLE = ["lm_head", "q_proj"], ["embed_tokens", "q_proj"]
KINDS = {
    "BOFT": ("BOFTConfig", {"boft_block_size": 2}),
    "C3A": ("C3AConfig", {"block_size": 2}),
    "DELORA": ("DeloraConfig", {"r": 2}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 40}),
    "GRALORA": ("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "HIRA": ("HiraConfig", {"r": 2}),
    "IA3": ("IA3Config", {"feedforward_modules": ["lm_head"]}),
    "LOHA": ("LoHaConfig", {"r": 2}),
    "LOKR": ("LoKrConfig", {"r": 2}),
    "MISS": ("MissConfig", {"r": 2}),
    "OFT": ("OFTConfig", {"oft_block_size": 4}),
    "RANDLORA": ("RandLoraConfig", {"r": 2}),
    "SHIRA": ("ShiraConfig", {"r": 2}),
    "UNILORA": ("UniLoraConfig", {"r": 2, "theta_d_length": 40}),
    "VBLORA": ("VBLoRAConfig", {"r": 2, "num_vectors": 9, "vector_length": 2, "topk": 2}),
    "VERA": ("VeraConfig", {"r": 2}),
}


def phi() -> nn.Module:
    """A head with a bias, which is not zero."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=50, hidden_size=24, intermediate_size=36, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    stir([model.lm_head.bias])
    return model


def by_peft(folder: Path, kind: str, base: nn.Module, targets: list[str], **saving) -> nn.Module:
    """PEFT's adapter of a kind, stirred, as its plain `save_pretrained` writes it."""
    from peft import get_peft_model

    config, options = KINDS[kind]
    theirs = get_peft_model(base, later(config, target_modules=targets, **options)()).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for number in theirs.parameters():
            if number.requires_grad:
                number.add_(torch.randn_like(number) * 0.2)
    theirs.save_pretrained(folder, **saving)
    return theirs


def agrees(folder: Path, theirs: nn.Module, fresh: nn.Module) -> fs.Adapter:
    before = logits(fresh)
    adapter = fs.load(fresh, folder)
    assert relative(logits(fresh), logits(theirs)) < 1e-5
    assert relative(before, logits(theirs)) > 1e-3
    assert not adapter.attached.trained
    return adapter


def test_every_method_is_here():
    assert KINDS.keys() == METHODS.keys()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_peft_saves_along(kind, tied, tmp_path):
    theirs = by_peft(tmp_path, kind, llama(tied), HEAD)
    assert f"{PREFIX}lm_head.base_layer.weight" in weights(tmp_path)
    agrees(tmp_path, theirs, llama(tied))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [TABLE, ["embed_tokens", "lm_head"]])
def test_a_table_that_peft_saves_along(targets, tied, tmp_path):
    theirs = by_peft(tmp_path / "with", "HIRA", llama(tied), targets)
    assert f"{PREFIX}model.embed_tokens.base_layer.weight" in weights(tmp_path / "with")
    adapter = agrees(tmp_path / "with", theirs, llama(tied))
    theirs.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    other = agrees(tmp_path / "without", theirs, llama(tied))
    assert torch.equal(logits(adapter.model), logits(other.model))


def test_a_head_with_a_bias(tmp_path):
    theirs = by_peft(tmp_path, "LOKR", phi(), HEAD)
    assert f"{PREFIX}lm_head.base_layer.bias" in weights(tmp_path)
    agrees(tmp_path, theirs, phi())


@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["LOKR", "VERA"])
def test_numbers_of_another_base_are_refused(kind, leaf, tmp_path):
    by_peft(tmp_path, kind, phi(), HEAD)
    key, held = f"{PREFIX}lm_head.base_layer.{leaf}", weights(tmp_path)
    save_file({**held, key: held[key] + 1}, tmp_path / "adapter_model.safetensors")
    model = phi()
    with pytest.raises(BaseMismatch, match=rf"repeats the base's 'lm_head\.{leaf}', \(50"):
        fs.load(model, tmp_path)
    assert "_finespun_adapters" not in model.__dict__
    with pytest.warns(UserWarning, match="repeats the base's"):
        fs.load(model, tmp_path, force=True)


def test_resized_tables_are_the_adapters_own(tmp_path):
    base = llama(tied=False)
    base.lm_head.weight.data += 0.1
    theirs = by_peft(tmp_path, "LOHA", base, ["q_proj"], save_embedding_layers=True)
    model = llama(tied=False)
    adapter = fs.load(model, tmp_path)
    assert set(adapter.attached.trained) == {"model.embed_tokens", "lm_head"}
    assert relative(logits(model), logits(theirs)) < 1e-5


def test_what_is_told_without_the_model_counts_no_number_of_the_base(tmp_path):
    by_peft(tmp_path, "LOKR", phi(), HEAD)
    told, held = summarise(tmp_path), weights(tmp_path)
    assert told is not None
    assert set(told.layers) == {"lm_head", "model.layers.0.self_attn.q_proj"}
    assert told.numbers == sum(t.numel() for k, t in held.items() if "base_layer" not in k)


@pytest.mark.parametrize(("kind", "targets"), [("LOKR", HEAD), ("OFT", HEAD), ("HIRA", TABLE)])
@pytest.mark.parametrize("tied", [True, False])
def test_with_the_base_named(kind, targets, tied, tmp_path, capsys):
    llama(tied).save_pretrained(tmp_path / "base")
    theirs = by_peft(tmp_path / "theirs", kind, llama(tied), targets)
    base = ["--model", str(tmp_path / "base")]
    assert run(["inspect", str(tmp_path / "theirs"), *base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    adapter = agrees(tmp_path / "theirs", theirs, llama(tied))
    assert [one["name"] for one in found["spectra"]] == list(adapter.attached.deltas)
    for one in found["spectra"]:
        delta = adapter.attached.deltas[one["name"]]
        update = delta.delta(delta.base_weight())
        assert one["norm"] == pytest.approx(float(update.norm()), rel=1e-4)


def test_the_head_of_a_family_that_stores_its_layers_transposed(tmp_path, capsys):
    gpt2().save_pretrained(tmp_path / "base")
    theirs = by_peft(tmp_path / "theirs", "VERA", gpt2(), ["lm_head", "c_attn"])
    named = ["--model", str(tmp_path / "base")]
    assert run(["inspect", str(tmp_path / "theirs"), *named]) == 0
    assert "lm_head (50 x 24)" in capsys.readouterr().out
    agrees(tmp_path / "theirs", theirs, gpt2())


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_patterns_must_be_a_table(option, tmp_path):
    by_peft(tmp_path, "LOHA", llama(), HEAD)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: [1]}))
    with pytest.raises(FileError, match=rf"{option} must be a table .*, got \[1\]"):
        fs.load(llama(), tmp_path)
