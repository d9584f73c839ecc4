"""PEFT's layers beside an adapter: nothing goes inside them, and they do not freeze it silently."""

from typing import Any

import pytest
import torch
from torch import nn

import finespun as fs
from finespun.errors import InputError, StateError, TargetError
from finespun.hosts.foreign import peft_layers


class Tuner(nn.Module):
    """A layer as PEFT makes them: the plain one inside, and two factors."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class PeftLinear(Tuner):
    """A subclass of somebody's."""


Tuner.__module__ = "peft.tuners.lora.layer"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).train()


@pytest.mark.parametrize("kind", [Tuner, PeftLinear])
@pytest.mark.parametrize("targets", ["all-linear", ["0"], ["2"], ["base_layer"], ["lora_A"]])
def test_a_model_that_holds_layers_of_peft_is_not_adapted(kind, targets, tmp_path):
    model = net()
    fs.adapt(model, fs.LoRA(rank=2), ["2"]).save(tmp_path / "ours")
    held = net()
    held[0] = kind(held[0])
    names = list(held.state_dict())
    for call in (
        lambda: fs.adapt(held, fs.LoRA(rank=2), targets),
        lambda: fs.load(held, tmp_path / "ours"),
    ):
        with pytest.raises(TargetError, match=r"a layer of PEFT's at '0'.*merge_and_unload"):
            call()
    assert list(held.state_dict()) == names
    assert all(p.requires_grad for p in held.parameters())


def test_what_is_no_module_is_told():
    text: Any = "bert-base-uncased"
    with pytest.raises(InputError, match="the model comes first"):
        fs.adapt(text, fs.LoRA(rank=2), "all-linear")


def put_over(model: nn.Sequential, place: int) -> None:
    """What get_peft_model does: wrap a layer, and freeze all that is not PEFT's."""
    model[place] = Tuner(model[place])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "deltas" not in name)


@pytest.mark.parametrize("place", [0, 2])
def test_an_adapter_that_peft_froze_is_named_in_the_first_training_pass(place):
    model = net()
    fs.adapt(model, fs.LoRA(rank=2), ["0"])
    put_over(model, place)
    with pytest.raises(StateError, match="adapter 'default' was frozen by PEFT"):
        model(torch.ones(1, 6))
    model.eval()
    with torch.no_grad():
        model(torch.ones(1, 6))


def test_peft_on_top_of_an_adapter_that_was_never_in_training_is_lawful(tmp_path):
    model = net()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fs.adapt(model, fs.LoRA(rank=2), ["0"]).save(tmp_path)
    other = net()
    other.load_state_dict(plain)
    fs.load(other, tmp_path)
    put_over(other, 2)
    other(torch.ones(1, 6)).sum().backward()
    assert peft_layers(other) == ["2"]


@pytest.mark.slow
def test_peft_itself():
    from peft import LoraConfig, get_peft_model
    from tiny import built

    config = LoraConfig(r=2, target_modules=["q_proj"])
    held = get_peft_model(built("llama"), config)
    with pytest.raises(TargetError, match="PEFT's around it"):
        fs.adapt(held, fs.LoRA(rank=2), "all-linear")
    with pytest.raises(TargetError, match="q_proj' and 2 more"):
        fs.adapt(held.get_base_model(), fs.LoRA(rank=2), "all-linear")
    model = built("llama")
    fs.adapt(model, fs.LoRA(rank=2), ["v_proj"])
    over, ids = get_peft_model(model, config).train(), torch.tensor([[4, 5, 6]])
    with pytest.raises(StateError, match="was frozen by PEFT"):
        over(ids, labels=ids)
    fs.adapt(held.unload(), fs.LoRA(rank=2), "all-linear")
