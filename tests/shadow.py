"""An adapted model and its shadow: what it should compute, written out beside it.

`World` makes every call on a model with adapters and follows it on a plain copy of the base and on
dense updates. After each call the outputs must be those of the formula and the base must be there
bit for bit; a call that is refused must have changed nothing.
"""

import copy
import pickle
import threading
import warnings
from contextlib import ExitStack

import torch
from suite import bytes_of, draw, relative, same, stir
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.errors import FinespunError, StateError
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


class World:
    """The model, its shadow, and the calls."""

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
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work()
        except FinespunError as error:
            after = self.snapshot()
            assert before[0] == after[0], error  # noqa: PT017
            assert same(before[1], after[1]), error  # noqa: PT017
            self.refused += 1
            return False
        finally:
            self.done += 1
        return True

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

    # --- calls ----------------------------------------------------------------------------------
    def adapt(self, name):
        def work():
            made = fs.adapt(self.model, STRUCTURES[name], list(SITES), TRAINED[name], name)
            stir(made.parameters(), seed=len(self.records) + ord(name))

        if self.call(work):
            self.records[name] = Record(self.model, name, self.plain)
            self.active = {name: 1.0}

    def keep(self, name):
        """Take its state into the library."""
        if name in self.records:
            state = fs.Adapter(self.model, name).attached.snapshot()
            self.library[name] = state, copy.deepcopy(self.records[name])

    def load(self, name):
        if name not in self.library:
            return
        state, record = self.library[name]

        def work():
            hosts.register(self.model, state)
            try:
                fs.activate(self.model, name)
            except BaseException:
                hosts.remove(self.model, name)
                raise
            for p in fs.Adapter(self.model, name).parameters():
                p.requires_grad_(False)

        if self.adapted and self.call(work):
            self.records[name] = copy.deepcopy(record)
            self.records[name].to(self.plain.up.weight.dtype)
            self.records[name].strength = state.strength
            self.look(name)
            self.active = {name: 1.0}

    def swap(self, name):
        if name in self.library and name in self.records:
            state = self.library[name][0]
            if self.call(lambda: hosts.swap(self.model, name, state)):
                self.look(name)

    def look(self, *names):
        """Take down what adapters have become."""
        for name in names or self.records:
            self.records[name] = Record(self.model, name, self.plain)

    def activate(self, weights):
        weights = {n: c for n, c in weights.items() if n in self.records}
        if self.adapted and self.call(lambda: fs.activate(self.model, weights)):
            self.active = weights

    def scale(self, name, value):
        if name in self.records:
            made = fs.Adapter(self.model, name)
            if self.call(lambda: setattr(made, "scale", value)):
                self.records[name].strength = value

    def merge(self, weights, undo):
        weights = {n: c for n, c in weights.items() if n in self.records}
        if self.adapted and weights and self.call(lambda: hosts.merge(self.model, weights, undo)):
            self.merged, self.undo = weights, undo

    def unmerge(self):
        if self.adapted and self.call(lambda: hosts.unmerge(self.model)):
            self.merged = {}

    def evict(self, name):
        if name in self.records and self.call(lambda: fs.evict(self.model, name)):
            assert name not in adapter_set_of(self.model).attached

    def detach(self, name):
        if name in self.records and self.call(lambda: fs.Adapter(self.model, name).detach()):
            del self.records[name]
            self.active = {n: c for n, c in self.active.items() if n != name}
            if self.merged.pop(name, None) is not None and not self.merged:
                self.rebase()

    def rebase(self):
        """What stands in the weights is the base now: updates were merged for good."""
        own = self.model.state_dict()
        if not self.records:
            self.plain.load_state_dict(own)
            return
        for site in SITES:
            for key in (f"{site}.weight", f"{site}.bias"):
                self.plain.get_parameter(key).data = own[key].detach().clone()

    def bake(self):
        y = self.model(self.x).detach()
        if self.adapted and self.call(lambda: fs.bake(self.model)):
            assert relative(self.model(self.x).detach(), y) < EPS[y.dtype]
            self.records, self.active, self.merged = {}, {}, {}
            self.rebase()

    def retrain(self, name):
        if name in self.records:
            self.call(fs.Adapter(self.model, name).make_trainable)

    def open(self, kind, names=()):
        if not self.adapted:
            return
        if any(name is not None and name not in self.records for name in names):
            return
        stack = ExitStack()
        block = hosts.disabled(self.model) if kind == "disabled" else fs.rows(self.model, names)
        if not self.call(lambda: stack.enter_context(block)):
            return
        kept = {"rows": self.rows}
        if kind == "disabled":
            kept |= {"active": self.active, "merged": self.merged}
            self.active, self.merged, self.rows = {}, {}, None
        else:
            self.rows = list(names)
        self.blocks.append([stack, kept, False])

    def close(self, index, error=False):
        """Leave a block, perhaps before those inside it, perhaps by an exception."""
        still = [block for block in self.blocks if not block[2]]
        if not still:
            return
        block = still[index % len(still)]
        if error:
            stack = block[0]
            try:
                with stack:
                    raise RuntimeError("stop")
            except RuntimeError:
                pass
        else:
            block[0].close()
        block[2] = True
        while self.blocks and self.blocks[-1][2]:
            self.__dict__.update(self.blocks.pop()[1])

    def step(self):
        """One step of SGD in train mode, with the shadow's statistics beside it."""
        if self.blocks:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        twin = self.twin({**self.active, **self.merged}, self.active).train()
        self.model.train()
        try:
            loss = self.model(self.x).square().mean()
            twin(self.x)
            if not self.records:
                self.plain.train()
                self.plain(self.x)
                self.plain.eval()
            elif loss.requires_grad:
                self.backward(loss, parameters)
        finally:
            self.model.eval()
        for leaf, value in twin.norm.named_buffers():
            live = self.model.norm._buffers[leaf]
            assert relative(live, value) < EPS[self.x.dtype], leaf
        if self.records:
            self.follow_frozen()
            self.look(*(set(self.records) & set(adapter_set_of(self.model).attached)))

    def follow_frozen(self):
        """Where nothing that acts was ever trained here, a training pass moves the base itself."""
        if not self.owned():
            for leaf, value in self.model.norm.named_buffers():
                self.plain.norm._buffers[leaf] = value.clone()

    def owned(self):
        return any(name in adapter_set_of(self.model).buffers.own for name in self.active)

    def backward(self, loss, parameters):
        try:
            loss.backward()
        except StateError as error:
            assert "merged" in str(error)  # noqa: PT017
            assert self.merged
            return
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p.sub_(RATE * p.grad)
                    p.grad = None

    def edit(self, site):
        """The user changes a weight of the base."""
        if self.merged or self.blocks:
            return
        for model in (self.model, self.plain):
            model.get_submodule(site).weight.data.mul_(1.25)

    def interrupt(self, error):
        """A forward pass dies; afterwards another thread may change the model."""

        def stop(*_):
            raise error

        handle = self.model.down.register_forward_pre_hook(stop)
        try:
            self.model(self.x)
        except (RuntimeError, KeyboardInterrupt):
            pass
        finally:
            handle.remove()
        if not self.adapted or self.blocks:
            return
        raised = []

        def elsewhere():
            try:
                with hosts.disabled(self.model):
                    pass
            except StateError as refusal:
                raised.append(refusal)

        worker = threading.Thread(target=elsewhere)
        worker.start()
        worker.join()
        assert not raised or "undo='none'" in str(raised[0])

    def copied(self, way):
        """Go on with a copy; inside of blocks look at it only."""
        other = copy.deepcopy(self.model) if way == "deepcopy" else self.pickled()
        if self.blocks:
            assert not adapter_set_of(other).blocks
            assert torch.isfinite(other(self.x)).all()
            return
        self.model = other

    def pickled(self):
        return pickle.loads(pickle.dumps(self.model))

    def to(self, dtype):
        if self.blocks and self.merged:
            return
        self.model.to(dtype)
        self.plain.to(dtype)
        self.x = self.x.to(dtype)
        for record in self.records.values():
            record.to(dtype)
        if self.adapted:
            live = adapter_set_of(self.model).attached
            self.look(*(set(live) & set(self.records) - set(self.merged)))

    def end(self):
        """Out of all blocks, unmerged and detached, the base stands there bit for bit."""
        while self.blocks:
            self.close(-1)
        if self.merged and self.undo != "none":
            self.unmerge()
        for name in list(self.records):
            self.detach(name)
        assert not self.records
        self.check()
