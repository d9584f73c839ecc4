"""PEFT's folders whose start was taken out of the base's weights, and not put back."""

import warnings

import pytest
import torch
from peft_folders import bert, gpt2

import finespun as fs
from finespun.errors import FileError
from finespun.files import read_adapter

pytestmark = pytest.mark.slow
QUERIES = {"bert": (bert, ["query", "value"]), "gpt2": (gpt2, ["c_attn"])}
CASES = [
    ("bert", "pissa", {}),
    ("bert", "olora", {}),
    ("bert", "pissa", {"use_rslora": True}),
    ("bert", "olora", {"use_rslora": True}),
    ("bert", "pissa", {"rank_pattern": {"value": 2}, "alpha_pattern": {"value": 5}}),
    ("gpt2", "pissa", {"fan_in_fan_out": True}),
]


def trained(name, kind, options, folder):
    """PEFT's own model after three steps, saved as PEFT saves it, and what it says."""
    import peft

    make, targets = QUERIES[name]
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, init_lora_weights=kind, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(), config)
    tokens = torch.arange(24).view(3, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens).logits.square().mean().backward()
        optimizer.step()
    model.save_pretrained(folder)
    return tokens, model.eval()(tokens).logits.detach()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([*case[:2], *case[2]]))
def test_unconverted_starts_are_read_exactly(case, tmp_path):
    name, kind, options = case
    tokens, wanted = trained(name, kind, options, tmp_path / "x")
    model = QUERIES[name][0]()
    with pytest.warns(UserWarning, match="no fingerprint"):
        fs.load(model, tmp_path / "x")
    found = model(tokens).logits.detach()
    base = QUERIES[name][0]()(tokens).logits.detach()
    assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())
    assert float((base - wanted).norm()) > 1e-4 * float(wanted.norm())


def test_without_the_base_they_are_refused_with_the_remedy(tmp_path):
    trained("bert", "pissa", {}, tmp_path / "x")
    with pytest.raises(FileError, match=r"load it onto its base.*weight_conversion"):
        read_adapter(tmp_path / "x")
