"""Every row of docs/peft.md, run on both sides with the same weights."""

import re
from pathlib import Path

import pytest
import torch
from tiny import built, words

import finespun as fs
from finespun import hosts

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
SIDE_BY_SIDE = PAGE.read_text(encoding="utf-8").partition("\n## Its other methods")[0]


def names_of_peft():
    """What a row may use of PEFT."""
    from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model, save_as_lora
    from peft.helpers import rescale_adapter_scale
    from peft.utils.hotswap import hotswap_adapter

    return {
        "LoraConfig": LoraConfig,
        "PeftModel": PeftModel,
        "TrainableTokensConfig": TrainableTokensConfig,
        "get_peft_model": get_peft_model,
        "hotswap_adapter": hotswap_adapter,
        "rescale_adapter_scale": rescale_adapter_scale,
        "save_as_lora": save_as_lora,
    }


def rows():
    """(part, what, PEFT's code, ours) of every row of the page's tables."""
    found = []
    for section in SIDE_BY_SIDE.split("\n## ")[1:]:
        part = section.partition("\n")[0]
        for what, theirs, ours in re.findall(
            r"^\| ([^|`]+) \| `(.+?)` \| `(.+?)` \|$", section, re.M
        ):
            found.append(pytest.param(part, theirs, ours, id=what))
    return found


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """PEFT adapters "fr" and "de" on disk, in the present folder."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("fr", "de")):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
        model = get_peft_model(built("llama"), config)
        torch.manual_seed(seed)
        for key, p in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p, std=0.2)
        model.save_pretrained(name)
    return tmp_path


def scene(side, part):
    """The names that a row may use."""
    from peft import PeftModel

    model, names = built("llama"), {"ids": words(), "torch": torch}
    if side == "ours":
        names |= {"fs": fs}
        if part == "Using":
            for name in ("fr", "de"):
                fs.load(model, name)
            names["adapter"] = fs.Adapter(model, "fr").activate()
    else:
        names |= names_of_peft()
        if part == "Using":
            model = PeftModel.from_pretrained(model, "fr", adapter_name="fr")
            model.load_adapter("de", "de")
            model.eval()
    return {**names, "model": model}


def result(names):
    if "y" in names:
        return names["y"]
    with torch.no_grad():
        return names["model"].eval()(words()).logits


def adapted(names):
    """Names of the adapted layers, and how many parameters train."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    model = names["model"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if isinstance(model, PeftModel):
        inner, layers = model.base_model.model, (LoraLayer, TrainableTokensLayer)
        return {n for n, m in inner.named_modules() if isinstance(m, layers)}, trained
    return set(hosts.hosts_of(model)), trained


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("part", "theirs", "ours"), rows())
def test_both_sides_of_a_row_agree(part, theirs, ours, folders, monkeypatch):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base = result({"model": built("llama")})
    found = {}
    for side, code in (("theirs", theirs), ("ours", ours)):
        names = found[side] = scene(side, part)
        exec(code, names)
        for made in ("out", "whole"):
            if (folders / made).exists():
                (folders / made).rename(folders / f"{side}-{made}")
    mine, peer = (found[side] for side in ("ours", "theirs"))
    torch.testing.assert_close(result(mine), result(peer), atol=2e-5, rtol=1e-4)
    assert mine.get("n") == peer.get("n")
    if part == "Starting":
        assert adapted(mine) == adapted(peer)
        assert adapted(mine)[0]
    if "is_trainable" in theirs:
        assert adapted(mine)[1] == adapted(peer)[1] > 0
    if part != "Starting" and "unload()" not in theirs.replace("merge_and_unload()", ""):
        assert ("disable" in theirs) == torch.allclose(result(mine), base, atol=1e-4)
    for side in ("theirs", "ours"):
        if (folders / f"{side}-out").exists():
            loaded = PeftModel.from_pretrained(built("llama"), folders / f"{side}-out")
            found[side] = result({"model": loaded})
        if (folders / f"{side}-whole").exists():
            loaded = LlamaForCausalLM.from_pretrained(folders / f"{side}-whole")
            found[side] = result({"model": loaded})
    if isinstance(found["ours"], torch.Tensor):
        torch.testing.assert_close(found["ours"], found["theirs"], atol=2e-4, rtol=1e-3)
        assert not torch.allclose(found["ours"], base, atol=1e-3)


def test_no_row_of_the_page_is_left_out():
    shown = re.findall(r"^\| (?!to \||---)", SIDE_BY_SIDE, re.M)
    assert len(rows()) == len(shown) > 20
    assert {row.values[0] for row in rows()} == {"Starting", "Using", "Files"}
