"""Whatever is called in whatever order, in blocks closed in any order: outputs are those of the
formula, the base is there bit for bit, and what is refused has changed nothing."""

import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from shadow_calls import World

NAMES = st.sampled_from("abc")
WEIGHTS = st.dictionaries(NAMES, st.sampled_from([1.0, 0.5, -0.25]), max_size=3)
SERVED = st.lists(st.none() | NAMES, min_size=4, max_size=4) | NAMES.map(lambda name: [name] * 4)
MET = {"done": 0, "refused": 0}


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.world = World()

    @rule(name=NAMES)
    def adapt(self, name):
        self.world.adapt(name)

    @rule(name=NAMES)
    def keep(self, name):
        self.world.keep(name)

    @rule(name=NAMES)
    def load(self, name):
        self.world.load(name)

    @rule(name=NAMES)
    def swap(self, name):
        self.world.swap(name)

    @rule(weights=WEIGHTS)
    def activate(self, weights):
        self.world.activate(weights)

    @rule(name=NAMES, value=st.sampled_from([1.0, 0.5, 2.0]))
    def scale(self, name, value):
        self.world.scale(name, value)

    @rule(weights=WEIGHTS, undo=st.sampled_from(["memory", "entries", "memory", "none"]))
    def merge(self, weights, undo):
        self.world.merge(weights, undo)

    @rule()
    def unmerge(self):
        self.world.unmerge()

    @rule(name=NAMES)
    def evict(self, name):
        self.world.evict(name)

    @rule(name=NAMES)
    def detach(self, name):
        self.world.detach(name)

    @rule()
    def bake(self):
        self.world.bake()

    @rule(name=NAMES)
    def retrain(self, name):
        self.world.retrain(name)

    @rule()
    def disabled(self):
        self.world.open("disabled")

    @rule(names=SERVED)
    def rows(self, names):
        self.world.open("rows", names)

    @rule(index=st.integers(0, 3), error=st.booleans())
    def close(self, index, error):
        self.world.close(index, error)

    @rule(index=st.integers(0, 3))
    def close_more(self, index):
        self.world.close(index)

    @rule()
    def step(self):
        self.world.step()

    @rule(site=st.sampled_from(["up", "down"]))
    def edit(self, site):
        self.world.edit(site)

    @rule(error=st.sampled_from([RuntimeError, KeyboardInterrupt]))
    def interrupt(self, error):
        self.world.interrupt(error)

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def copied(self, way):
        self.world.copied(way)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def to(self, dtype):
        self.world.to(dtype)

    @invariant()
    def holds(self):
        self.world.check()

    def teardown(self):
        self.world.end()
        for key in MET:
            MET[key] += getattr(self.world, key)


def run(examples, steps, seed):
    machine = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if steps > 25 else list(Phase),
    )
    run_state_machine_as_test(Machine, settings=machine)


def test_any_order_of_calls():
    run(16, 25, None)


@pytest.mark.full
def test_any_order_of_twenty_thousand_calls():
    before = dict(MET)
    random.seed(7)
    run(400, 50, 7)
    print({key: MET[key] - before[key] for key in MET})
