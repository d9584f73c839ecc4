"""An optimiser that was made before the adapter is refused at its first step, whatever its kind."""

import copy

import pytest
import torch
from torch import nn

import finespun as fs
from finespun.driver import Driver
from finespun.errors import InputError, TrainingError

KINDS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "in groups": lambda p: torch.optim.Adam([{"params": [one]} for one in p], 1e-3),
}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_made_before_adapt(kind):
    model = net()
    optimizer = KINDS[kind](list(model.parameters()))
    step(model, optimizer)
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["0"])
    with pytest.raises(TrainingError, match=r"trains nothing: its 4 .* adapter 'default'"):
        step(model, optimizer)
    with pytest.raises(InputError, match="was it made before the adapter"):
        Driver(model, "default", optimizer)
    step(model, KINDS[kind](adapter.parameters()))
    adapter.detach()
    step(model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_made_after_adapt_of_all_parameters(kind):
    model = net()
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["0"])
    before = [p.detach().clone() for p in adapter.parameters()]
    optimizer = KINDS[kind](list(model.parameters()))
    step(model, optimizer)
    assert not all(torch.equal(a, b) for a, b in zip(before, adapter.parameters()))


def test_other_models_are_left_alone():
    other, model = net(), net()
    twin = copy.deepcopy(model)
    fs.adapt(model, fs.LoRA(rank=2), ["0"])
    for one in (other, twin):
        step(one, torch.optim.SGD(one.parameters(), 0.1))
    frozen = net().requires_grad_(False)  # frozen by its owner: none of ours
    torch.optim.SGD(frozen.parameters(), 0.1).step()
