"""Values of the axes in a bare loop on a small net that computes its own loss."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from suite import DEVICE, draw, net, stir
from torch import nn

import finespun as fs
from finespun.driver import Driver, prepare, set_lr

LORA, LSR = fs.LoRA(rank=3), fs.LSR(rank=4, separation_rank=3)
STEPS = 6


class Losing(nn.Module):
    """A net that returns its loss, in single precision or under autocast."""

    def __init__(self, autocast=False):
        super().__init__()
        self.inner, self.autocast = net(), autocast

    def forward(self, x, labels=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.inner(x)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return Outputs(loss=loss, logits=logits)


class Outputs(SimpleNamespace):
    """What transformers' models return, as far as the driver looks."""

    def __setitem__(self, key, value):
        assert key == 0
        self.loss = value


def ready(value, structure=LORA, lr=0.02, clip=1.0, stirred=True, optimizer=None, **options):
    """A model in training, its adapter, the optimiser and the driver of one value."""
    torch.manual_seed(0)
    model = Losing(**options).train()
    adapter = fs.adapt(model, structure, ["up", "down"], ())
    if stirred:
        stir(adapter.parameters())
    prepared = prepare(model, "default", [value] if value else [], steps=STEPS)
    made = prepared.optimizer(lr) if optimizer is None else optimizer(prepared.groups(lr))
    return model, adapter, made, Driver(model, "default", made, clip, prepared)


def rows(seed, count=6):
    return {"x": draw(count, 3, 24, seed=seed), "labels": torch.arange(count, device=DEVICE) % 5}


def step(model, optimizer, driver, seed, micros=1, scaler=None):
    """One step at a rate of its own; micro-batches have an equal share of the loss."""
    set_lr(optimizer, 0.02 / (1 + seed))
    optimizer.zero_grad()
    for micro in range(micros):
        driver.micro_batch(micro == 0, 1 / micros)
        loss = model(**rows(10 * seed + micro)).loss / micros
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def parameters(adapter):
    return [p.detach().clone() for p in adapter.parameters()]
