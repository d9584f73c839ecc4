"""What the tests of LoR2C share: a stack of blocks, and every span of it written out."""

from types import SimpleNamespace

import torch
from torch import nn

import finespun as fs
from finespun.driver import prepare
from finespun.hosts import View, link
from finespun.methods.allocation.merge_inject import span
from finespun.methods.structures import LoR2C

BLOCKS = [f"layer.{i}" for i in range(4)]
BOTH = [*BLOCKS, "query", "value"]


class Block(nn.Module):
    """h + value(tanh(query(h)))."""

    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, h):
        return h + self.value(torch.tanh(self.query(h)))


class Stack(nn.Module):
    """Blocks in a row; `how` says how each of them is called."""

    def __init__(self, width=8, depth=4):
        super().__init__()
        self.layer = nn.ModuleList(Block(width) for _ in range(depth))
        self.how = lambda layer, h: layer(h)

    def forward(self, h):
        for layer in self.layer:
            h = self.how(layer, h)
        return h


def adapted(form=None, targets=BOTH, width=8, depth=4, stir=True):
    """A stack with LoR2C on it, every living number moved."""
    torch.manual_seed(5)
    model = Stack(width, depth)
    adapter = fs.adapt(model, form or LoR2C(rank=4), targets, train_modules=())
    if stir:
        for name, delta in adapter.deltas.items():
            if "." not in name.removeprefix("layer."):
                nn.init.normal_(delta.B, std=0.1)
    return model, adapter


def around(adapter, **spans):
    """Let bypasses go around other blocks: layer_1=(0, 2)."""
    for name, (first, last) in spans.items():
        name = name.replace("_", ".")
        ends = [f"layer.{first}", f"layer.{last}"]
        adapter.attached.plan = adapter.attached.plan.choose(name, span=ends)
    link(adapter.name, adapter.attached.plan, adapter.deltas)


def by_hand(plain, adapter, x):
    """Every span written out, from the plan alone."""
    seen, outs = [], x
    for i, layer in enumerate(plain.layer):
        seen.append(outs)
        outs = layer(outs)
        for name, delta in adapter.deltas.items():
            first, last = span(adapter.attached, name)
            if last == f"layer.{i}" and name.count(".") == 1:
                A, B = delta.factors()
                outs = outs + delta.scale * seen[int(first[-1])] @ A.T @ B.T
    return outs


def view(adapter):
    """The adapter as methods see it."""
    return View(adapter.model, adapter.name)


def begun(form, adapter, steps):
    """The hooks of an allocation for a run of so many steps."""
    return prepare(adapter.model, adapter.name, [form], steps).hooks[0]


def after(hooks, step):
    """What happens when `step` steps are finished."""
    hooks.after_step(SimpleNamespace(step=step - 1))
