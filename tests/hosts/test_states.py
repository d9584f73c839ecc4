"""Whatever is called in whatever order: it works, with the right output and the base at hand, or it
refuses and leaves every bit and the state."""

import copy
import itertools
import pickle
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from suite import batch, bytes_of, net, relative, same, stir, twin
from tiers import sampled

import finespun as fs
from finespun import hosts
from finespun.errors import FinespunError, InputError, StateError
from finespun.hosts import states
from finespun.hosts.adapter_set import adapter_set_of
from finespun.methods.structures import SHiRA

SITES = ("blocks.0.up", "blocks.1.down")
NAMES = ("a", "b")
ROWS = ["a", None, "b", "a", None, "b"]


class World:
    """A model with a SHiRA "a" and a LoRA "b", and what it should compute, kept beside it."""

    def __init__(self):
        self.plain, self.model, self.x = net(), net(), batch()
        self.base = bytes_of(self.plain)
        for name, structure in (("a", SHiRA(rank=2)), ("b", fs.LoRA(rank=2))):
            stir(fs.adapt(self.model, structure, list(SITES), (), name).parameters(), len(name))
        fs.activate(self.model, "a")
        fs.Adapter(self.model, "a").make_trainable()
        self.there = set(NAMES)
        self.active, self.merged, self.undo, self.rows = {"a": 1.0}, {}, "", None
        self.blocks = []
        self.moves = {}
        self.look()

    def look(self):
        """Take down what the updates are now."""
        for name in NAMES:
            for site, host in hosts.hosts_of(self.model, name).items():
                delta = host.delta(name)
                self.moves[name, site] = delta.dense(delta.base_weight()).detach().clone()

    def wanted(self):
        """The output of the state that the model should be in."""
        if self.rows is None:
            return self._with({**self.active, **self.merged}, self.x)
        return torch.cat(
            [self._with({n: 1.0} if n else {}, x[None]) for n, x in zip(self.rows, self.x)]
        )

    def _with(self, weights, x):
        model = twin(self.plain)
        for name, c in weights.items():
            for site in SITES:
                model.get_submodule(site).weight.data += c * self.moves[name, site]
        return model(x).detach()

    def snapshot(self):
        found = adapter_set_of(self.model)
        told = found.active, found.rows, dict(found.merged), len(found.blocks)
        kinds = [type(m) for m in self.model.modules()]
        return told, kinds, bytes_of(self.model), self.model(self.x).detach()

    def open(self, block, **now):
        """Enter a block that sets these fields and puts them back when it is left."""
        block.__enter__()
        self.blocks.append((block, {field: getattr(self, field) for field in now}))
        self.__dict__.update(now)

    def leave(self):
        """The innermost block ends."""
        if self.blocks:
            block, before = self.blocks.pop()
            self.__dict__.update(before)
            block.__exit__(None, None, None)


def activate(world, wanted):
    fs.activate(world.model, wanted)
    world.active = dict(wanted)


def merge(world, undo):
    hosts.merge(world.model, {"a": 1.0}, undo=undo)
    world.merged, world.undo = {"a": 1.0}, undo


def unmerge(world):
    hosts.unmerge(world.model)
    world.merged = {}


def detach(world):
    fs.Adapter(world.model, "b").detach()
    world.there.discard("b")
    world.active = {n: c for n, c in world.active.items() if n != "b"}


def evict(world):
    fs.evict(world.model, "b")


def step(world):
    parameters = [p for p in world.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    loss = world.model(world.x).square().mean()
    if loss.requires_grad:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        world.look()


CALLS = {
    "activate a": lambda w: activate(w, {"a": 1.0}),
    "activate b": lambda w: activate(w, {"b": 0.5}),
    "activate both": lambda w: activate(w, {"a": 1.0, "b": 0.5}),
    "activate none": lambda w: activate(w, {}),
    "disabled": lambda w: w.open(hosts.disabled(w.model), active={}, rows=None, merged={}),
    "rows": lambda w: w.open(hosts.rows(w.model, ROWS), rows=ROWS),
    "leave": World.leave,
    "merge memory": lambda w: merge(w, "memory"),
    "merge entries": lambda w: merge(w, "entries"),
    "merge none": lambda w: merge(w, "none"),
    "unmerge": unmerge,
    "detach": detach,
    "evict": evict,
    "step": step,
}


def attempt(call, world):
    """What the call was refused with, or None."""
    try:
        call(world)
    except FinespunError as error:
        return error
    return None


def walk(names):
    """Make these calls in turn; each works as it should or refuses with nothing changed."""
    world = World()
    for i, name in enumerate(names):
        before = world.snapshot()
        call = name.partition(" ")[0]
        asked = "b" if call in ("evict", "detach") else None
        found = states.states(adapter_set_of(world.model), asked)
        refused = any(r.call == call and r.state in found for r in states.TABLE)
        told = f"{names[: i + 1]}"
        error = attempt(CALLS[name], world)
        assert (error is None) <= (not refused), told
        if error is not None:
            why_else = "merged" in str(error) or "b" not in world.there
            assert refused or why_else, told
            after = world.snapshot()
            assert before[:2] == after[:2], told
            assert same(before[2], after[2]), told
            assert torch.equal(before[3], after[3]), told
        assert relative(world.model(world.x), world.wanted()) < 1e-5, told
    recover(world, names)


def recover(world, names):
    """Out of all blocks and unmerged, the base stands there bit for bit."""
    while world.blocks:
        world.leave()
    assert relative(world.model(world.x), world.wanted()) < 1e-5, names
    if world.merged and world.undo == "none":
        with pytest.raises(StateError, match="undo='none'"):
            hosts.unmerge(world.model)
        return
    if world.merged:
        hosts.unmerge(world.model)
    kept = {k: v for k, v in bytes_of(world.model).items() if k in world.base}
    assert same(kept, world.base), names


@pytest.mark.parametrize("first", CALLS)
def test_all_pairs_of_calls(first):
    for second in CALLS:
        walk((first, second))


@pytest.mark.parametrize("first", sampled(CALLS, 0.0, 0.2, least=0))
def test_all_triples_of_calls(first):
    for second, third in itertools.product(CALLS, repeat=2):
        walk((first, second, third))


def test_every_state_of_the_table_is_met():
    met = set()
    for names in itertools.product(CALLS, repeat=2):
        world = World()
        for name in names:
            attempt(CALLS[name], world)
            met |= states.states(adapter_set_of(world.model), "a")
        while world.blocks:
            world.leave()
    asked = {"leaves merged ones out", "leaves others behind", "gathered"}
    assert met == {refusal.state for refusal in states.TABLE} - asked


def test_adding_an_adapter_is_refused_and_leaves_the_model():
    world = World()
    before = world.snapshot()
    with hosts.disabled(world.model), pytest.raises(StateError, match="inside disabled"):
        fs.adapt(world.model, fs.LoRA(rank=1), list(SITES), (), "c")
    after = world.snapshot()
    assert before[:2] == after[:2]
    assert same(before[2], after[2])
    with pytest.raises(InputError, match="no adapter is called 'c'"):
        fs.activate(world.model, "c")


@pytest.mark.parametrize("outer", ["disabled", "rows"])
@pytest.mark.parametrize("inner", ["disabled", "rows"])
def test_blocks_left_in_the_wrong_order_end_in_the_right_one(outer, inner):
    world = World()
    blocks = {
        "disabled": lambda: hosts.disabled(world.model),
        "rows": lambda: hosts.rows(world.model, ROWS),
    }
    y = world.model(world.x)
    one, other = ExitStack(), ExitStack()
    one.enter_context(blocks[outer]())
    other.enter_context(blocks[inner]())
    within = world.model(world.x)
    one.close()
    assert torch.equal(world.model(world.x), within)
    other.close()
    assert torch.equal(world.model(world.x), y)
    assert not adapter_set_of(world.model).blocks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_inside_a_block_is_inside_of_none(copied):
    world = World()
    with hosts.disabled(world.model):
        other = copied(world.model)
    assert not adapter_set_of(other).blocks
    fs.activate(other, "a")
    assert torch.equal(other(world.x), world.model(world.x))


def test_the_page_shows_the_table():
    page = Path(hosts.__file__).parent.parent.parent / "docs" / "architecture.md"
    assert states.table() in page.read_text(encoding="utf-8")
