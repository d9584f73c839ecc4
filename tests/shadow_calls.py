"""The calls that a model with adapters knows, each followed on its shadow."""

import copy
import pickle
import threading
from contextlib import ExitStack

import torch
from shadow import EPS, RATE, SITES, STRUCTURES, TRAINED, Record, Shadowed, refused
from suite import relative, stir

import finespun as fs
from finespun import hosts
from finespun.errors import StateError
from finespun.hosts.adapter_set import adapter_set_of


class World(Shadowed):
    """Makes every call on the model and follows it on the shadow."""

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
        refusal = refused(loss.backward)
        if refusal is not None:
            assert "merged" in str(refusal)
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
