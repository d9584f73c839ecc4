"""An adapted model and its shadow: what it should compute, written out beside it on a plain copy of
the base and on dense updates. The outputs must be those of the formula, the base must be there bit
for bit, and a call that is refused must have changed nothing."""

import copy
import warnings
from contextlib import ExitStack

import torch
from suite import bytes_of, draw, relative, same
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.errors import FinespunError
from finespun.hosts.adapter_set import adapter_set_of
from finespun.methods.structures import SHiRA

SITES = ("up", "down")
STRUCTURES = {"a": SHiRA(rank=2), "b": fs.LoRA(rank=2), "c": fs.LSR(rank=2)}
TRAINED = {"a": (), "b": ("head",), "c": ()}
EPS = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 0.15}
RATE = 0.02


class Small(nn.Module):
    """Two layers around running statistics, and a head."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.norm(self.up(x))))))


def small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Small().eval()


def refused(work):
    """What a call was refused with, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except FinespunError as error:
        return error
    return None


class Record:
    """What one adapter is: dense updates, its head, the buffers that it moved, its strength."""

    def __init__(self, model, name, plain):
        made = fs.Adapter(model, name)
        self.strength, self.kind = made.scale, made.structure.kind
        self.moves = {}
        for site, host in hosts.hosts_of(model, name).items():
            delta = host.delta(name)
            dense = delta.dense(plain.get_submodule(site).weight.detach())
            self.moves[site] = dense.detach().clone()
        head = made.attached.copies.get("head")
        self.head = None if head is None else copy.deepcopy(head)
        moved = made.attached.buffers.moved(name)
        self.buffers = {leaf: value.clone() for (_, leaf), value in moved.items()}

    def to(self, dtype):
        self.moves = {k: v.to(dtype) for k, v in self.moves.items()}
        self.head = None if self.head is None else self.head.to(dtype)
        self.buffers = {
            k: v.to(dtype) if v.is_floating_point() else v for k, v in self.buffers.items()
        }


class Shadowed:
    """The model, its shadow, and what must hold between them."""

    def __init__(self):
        self.model, self.plain, self.x = small(), small(), draw(4, 6, seed=2)
        self.records, self.library = {}, {}
        self.active, self.merged, self.undo, self.rows = {}, {}, "", None
        self.blocks = []
        self.refused = 0
        self.done = 0

    # --- the formula ----------------------------------------------------------------------------
    def wanted(self):
        if self.rows is None:
            return self.formula({**self.active, **self.merged}, self.active, self.x)
        parts = []
        for name, x in zip(self.rows, self.x):
            one = {} if name is None else {name: 1.0}
            parts.append(self.formula(one, one, x[None]))
        return torch.cat(parts)

    def twin(self, weights, acting):
        """A plain model in which these updates, and the heads and buffers of what acts, stand."""
        model = copy.deepcopy(self.plain)
        for name, c in weights.items():
            record = self.records[name]
            for site, move in record.moves.items():
                model.get_submodule(site).weight.data += c * record.strength * move
        for name in acting:
            record = self.records[name]
            if record.head is not None:
                model.head = copy.deepcopy(record.head)
            for leaf, value in record.buffers.items():
                model.norm._buffers[leaf] = value.clone()
        return model

    def formula(self, weights, acting, x):
        return self.twin(weights, acting)(x).detach()

    # --- what must hold -------------------------------------------------------------------------
    @property
    def adapted(self):
        return "_finespun_adapters" in self.model.__dict__

    def snapshot(self):
        told = None
        if self.adapted:
            found = adapter_set_of(self.model)
            told = found.active, found.rows, dict(found.merged), len(found.blocks), found.for_good
        kinds = [type(m) for m in self.model.modules()]
        flags = [p.requires_grad for p in self.model.parameters()]
        return (told, kinds, flags), bytes_of(self.model)

    def call(self, work):
        """Do it; refused, it must have changed nothing. Returns whether it was done."""
        before = self.snapshot()
        self.done += 1
        refusal = refused(work)
        if refusal is not None:
            after = self.snapshot()
            assert before[0] == after[0], refusal
            assert same(before[1], after[1]), refusal
            self.refused += 1
        return refusal is None

    def check(self):
        dtype = self.plain.up.weight.dtype
        found = self.model(self.x).detach()
        assert relative(found, self.wanted()) < EPS[dtype]
        if not self.adapted or not adapter_set_of(self.model).for_good:
            inner = hosts.disabled(self.model) if self.adapted else ExitStack()
            with inner:
                own = self.model.state_dict()
                for key, value in self.plain.state_dict().items():
                    assert torch.equal(own[key], value), key
            assert torch.equal(self.model(self.x).detach(), found)
        if not self.records:
            assert not self.adapted
            assert self.model.state_dict().keys() == self.plain.state_dict().keys()
            assert [type(m) for m in self.model.modules()] == [
                type(m) for m in self.plain.modules()
            ]
            assert all(p.requires_grad for p in self.model.parameters())
