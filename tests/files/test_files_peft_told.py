"""PEFT's folders whose sizes are their model's: told without it, read on the base's files alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import bert, edit, gpt2, later, llama, logits, weights
from suite import relative
from torch import nn

import finespun as fs
from finespun.cli.app import run
from finespun.errors import FileError, TargetError
from finespun.files import summarise

pytestmark = pytest.mark.filterwarnings("ignore")


def by_peft(folder: Path, config: Any, base: nn.Module) -> nn.Module:
    """PEFT's adapter, stirred, on a base, in a folder."""
    from peft import get_peft_model

    model = get_peft_model(base, config).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for number in model.parameters():
            if number.requires_grad:
                number.add_(torch.randn(number.shape, generator=g) / 2)
    model.save_pretrained(folder)
    return model


def inspected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert run(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


QUERIES = {"target_modules": ["query"]}
CONFIGS = {
    "LOHA": later("LoHaConfig", r=2, alpha=5, **QUERIES),
    "VERA": later("VeraConfig", r=4, **QUERIES),
    "UNILORA": later("UniLoraConfig", r=2, theta_d_length=30, **QUERIES),
    "IA3": later("IA3Config", feedforward_modules=[], modules_to_save=["classifier"], **QUERIES),
    "ADALORA": later("AdaLoraConfig", r=2, total_step=9, **QUERIES),
    "PROMPT_TUNING": later("PromptTuningConfig", num_virtual_tokens=3, task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_inspect_tells_what_a_folder_holds_without_its_model(method, tmp_path, capsys):
    by_peft(tmp_path, CONFIGS[method](), bert())
    edit(tmp_path, base_model_name_or_path="some/base")
    found, held = inspected([str(tmp_path)], capsys), weights(tmp_path)
    told = summarise(tmp_path)
    assert told is not None
    assert found["format"].startswith(f"PEFT's {method}")
    assert ("read as" in found["format"]) == (method not in ("ADALORA", "PROMPT_TUNING"))
    assert found["stored parameters"] + found["module parameters"] == sum(
        t.numel() for t in held.values()
    )
    assert found["bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found["base"] == "some/base"
    layers = {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}
    assert set(told.layers) == (set() if method in ("UNILORA", "PROMPT_TUNING") else layers)
    if method != "PROMPT_TUNING":
        assert "target_modules: ['query']" in found["options"]
    if method == "LOHA":
        assert {"r: 2", "alpha: 5"} <= set(found["options"])
        shapes = "hada_w1_a 24 x 2, hada_w1_b 2 x 24, hada_w2_a 24 x 2, hada_w2_b 2 x 24"
        assert found["layers"] == [f"{name}: {shapes}" for name in sorted(layers)]
        assert "--model" in found["notes"][0]
    if method == "VERA":
        assert found["shared"] == ["vera_A 4 x 24", "vera_B 24 x 4"]
    if method == "IA3":
        assert found["trained modules"] == ["classifier"]
        assert found["module parameters"] == 24 * 3 + 3
    if method in ("ADALORA", "PROMPT_TUNING"):
        assert found["notes"] == ["this method is not read"]
    assert run(["inspect", str(tmp_path)]) == 0
    assert method in capsys.readouterr().out


def test_a_lora_is_not_told_but_read(tmp_path, capsys):
    import peft

    by_peft(tmp_path, peft.LoraConfig(r=2, target_modules=["query"]), bert())
    assert summarise(tmp_path) is None
    assert summarise(tmp_path / "nowhere") is None
    assert len(inspected([str(tmp_path)], capsys)["spectra"]) == 2


BASES = {
    "loha": (bert, later("LoHaConfig", r=2, alpha=5, target_modules=["query", "dense"])),
    "unilora": (
        gpt2,
        later(
            "UniLoraConfig",
            r=2,
            theta_d_length=30,
            save_indices=True,
            target_modules=["c_attn", "c_fc"],
        ),
    ),
    "hira": (bert, later("HiraConfig", r=2, target_modules=["query", "dense"])),
    "vera": (gpt2, later("VeraConfig", r=6, target_modules=["c_attn"])),
}


@pytest.mark.parametrize("name", BASES)
def test_with_its_base_named_it_is_inspected_converted_and_merged(name, tmp_path, capsys):
    make, config = BASES[name]
    make().save_pretrained(tmp_path / "base")
    theirs = logits(by_peft(tmp_path / "theirs", config(), make()))
    base, src = ["--model", str(tmp_path / "base")], str(tmp_path / "theirs")
    found = inspected([src, *base], capsys)
    assert all(one["norm"] > 0 for one in found["spectra"])
    full = ["--set", "rank=24"] if name == "hira" else []
    assert run(["convert", src, str(tmp_path / "lora"), "--to", "lora", *full, *base]) == 0
    model = make()
    fs.load(model, tmp_path / "lora")
    assert relative(logits(model), theirs) < 1e-5
    assert relative(logits(make()), theirs) > 1e-2
    assert run(["merge", src, str(tmp_path / "merged"), *base]) == 0
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    assert relative(logits(merged), theirs) < 1e-5
    assert run(["compare", src, str(tmp_path / "lora"), *base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["distance"] < 1e-5


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoraConfig"])
def test_layers_are_listed_by_their_numbers(kind, tmp_path, capsys):
    base = llama(layers=11)
    base.save_pretrained(tmp_path / "base")
    by_peft(tmp_path / "a", later(kind, r=2, target_modules=["up_proj", "q_proj"])(), base)
    wanted = [
        f"model.layers.{i}.{name}"
        for i in range(11)
        for name in ("mlp.up_proj", "self_attn.q_proj")
    ]
    found = inspected([str(tmp_path / "a"), "--model", str(tmp_path / "base")], capsys)
    assert [line.split()[0] for line in found["layers"]] == wanted
    assert [one["name"] for one in found["spectra"]] == wanted
    if (told := summarise(tmp_path / "a")) is not None:
        assert list(told.layers) == wanted


def test_without_its_base_the_way_is_told(tmp_path, capsys):
    by_peft(tmp_path / "a", CONFIGS["LOHA"](), bert())
    assert run(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "lora"]) == 3
    told = capsys.readouterr().err
    assert "LOHA is read with its model only" in told
    assert "--model" in told
    assert not (tmp_path / "b").exists()


def test_a_base_that_lacks_a_layer_is_refused(tmp_path, capsys):
    gpt2().save_pretrained(tmp_path / "base")
    by_peft(tmp_path / "a", CONFIGS["LOHA"](), bert())
    assert run(["inspect", str(tmp_path / "a"), "--model", str(tmp_path / "base")]) == 3
    assert "has no tensor 'bert.encoder.layer." in capsys.readouterr().err
    with pytest.raises(TargetError, match=r"no module is called 'bert\.encoder"):
        fs.load(gpt2(), tmp_path / "a")


def test_places_that_the_model_tells_are_not_guessed_from_files(tmp_path, capsys):
    bert().save_pretrained(tmp_path / "base")
    by_peft(tmp_path / "a", CONFIGS["UNILORA"](), bert())
    assert run(["inspect", str(tmp_path / "a"), "--model", str(tmp_path / "base")]) == 3
    assert "fs.load(model, folder), or save it with save_indices=True" in capsys.readouterr().err


def test_the_command_line_offers_no_argument_of_python(tmp_path, capsys):
    import peft

    by_peft(tmp_path / "a", peft.LoraConfig(r=2, target_modules=["query"]), bert())
    edit(tmp_path / "a", from_the_future=5)
    assert run(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "lora"]) == 3
    told = capsys.readouterr().err
    assert "from_the_future=5 is unknown" in told
    assert "strict" not in told
    assert "from_the_future" in inspected([str(tmp_path / "a")], capsys)["notes"][0]
    with pytest.raises(FileError, match="from_the_future"):
        fs.convert(tmp_path / "a", tmp_path / "b", "lora")
