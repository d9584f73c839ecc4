"""Four threads on one model: each call works or is refused, and every output is one of those that a
lawful state gives; in the end the base is there bit for bit."""

import os
import random
import threading

import pytest
import torch
from shadow import small
from suite import bytes_of, draw, same, stir

import finespun as fs
from finespun import hosts
from finespun.errors import FinespunError, StateError
from finespun.hosts.adapter_set import adapter_set_of

WEIGHTS = [{}, {"a": 1.0}, {"b": 0.5}, {"a": 1.0, "b": 0.5}]
ROWS = [["a", None, "b", "a"], ["b"] * 4]


class Shared:
    """A model that several threads use, and all outputs that it may give."""

    def __init__(self, seed):
        self.model, self.x, self.seed = small(), draw(4, 6, seed=2), seed
        self.plain = bytes_of(self.model)
        for name in "ab":
            made = fs.adapt(self.model, fs.LoRA(rank=2), ["up", "down"], (), name)
            stir(made.parameters(), ord(name))
        self.lawful = []
        with torch.no_grad():
            for weights in WEIGHTS:
                fs.activate(self.model, weights)
                self.lawful.append(self.model(self.x))
            fs.activate(self.model, {})
            for names in ROWS:
                with fs.rows(self.model, names):
                    self.lawful.append(self.model(self.x))
        self.wrong, self.done, self.refused = [], 0, 0

    def look(self):
        with torch.no_grad():
            found = self.model(self.x)
        near = min(float((found - y).abs().max()) for y in self.lawful)
        if not near < 1e-5:
            self.wrong.append(f"an output {near:.3g} away from all lawful ones")

    def base(self):
        with hosts.disabled(self.model):
            self.look_at_base()

    def look_at_base(self):
        own = self.model.state_dict()
        if not all(torch.equal(own[key], value) for key, value in self.plain.items()):
            self.wrong.append("inside disabled() the base is another")

    def rows(self, names):
        with fs.rows(self.model, names):
            self.look()

    def work(self, number, steps):
        """Calls drawn by a stream of the thread's own; no exception but ours may leave one."""
        drawn = random.Random(self.seed * 10 + number)
        for _ in range(steps):
            weights = drawn.choice(WEIGHTS)
            call = drawn.choice(
                [
                    self.look,
                    self.base,
                    lambda w=weights: fs.activate(self.model, w),
                    lambda w=weights: hosts.merge(self.model, w) if w else None,
                    lambda: hosts.unmerge(self.model),
                    lambda: self.rows(drawn.choice(ROWS)),
                    lambda: fs.evict(self.model, drawn.choice("ab")),
                ]
            )
            try:
                call()
            except FinespunError:
                self.refused += 1
            except Exception as error:
                self.wrong.append(repr(error))
            self.done += 1

    def run(self, steps, count=4):
        threads = [threading.Thread(target=self.work, args=(n, steps)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.wrong, self.wrong[:3]
        if adapter_set_of(self.model).merged:
            hosts.unmerge(self.model)
        for name in "ab":
            fs.Adapter(self.model, name).detach()
        assert same(bytes_of(self.model), self.plain)


def test_four_threads():
    Shared(1).run(100)


@pytest.mark.full
def test_four_threads_do_twenty_thousand_calls():
    refused = 0
    for seed in range(10):
        shared = Shared(seed)
        shared.run(500)
        refused += shared.refused
    print({"calls": 20_000, "refused": refused})
    assert 0 < refused < 20_000


def elsewhere(work):
    """What another thread raised in doing it, or None."""
    raised = []

    def guarded():
        try:
            work()
        except StateError as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@pytest.mark.parametrize("first", ["rows", "disabled"])
@pytest.mark.parametrize("second", ["rows", "disabled"])
@pytest.mark.parametrize("order", ["inner first", "outer first"])
def test_a_model_is_free_once_all_blocks_are_left(first, second, order):
    shared = Shared(0)
    fs.activate(shared.model, "a")
    made = {"rows": lambda: fs.rows(shared.model, ROWS[0])}
    made["disabled"] = lambda: hosts.disabled(shared.model)
    blocks = [made[first](), made[second]()]
    for block in blocks:
        block.__enter__()
    change = lambda: fs.activate(shared.model, "b")  # noqa: E731
    for block in blocks if order == "outer first" else reversed(blocks):
        assert "another thread" in str(elsewhere(change))
        block.__exit__(None, None, None)
    assert elsewhere(change) is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_pass_that_died_counts_no_longer(error):
    shared = Shared(0)

    def stop(*_):
        raise error

    handle = shared.model.down.register_forward_pre_hook(stop)
    for _ in range(2):
        with pytest.raises(error):
            shared.model(shared.x)
    handle.remove()
    assert elsewhere(lambda: fs.activate(shared.model, "b")) is None
    shared.model(shared.x)
    assert elsewhere(lambda: fs.activate(shared.model, "b")) is None


def test_a_pass_that_runs_does_count():
    shared, said = Shared(0), []

    def change(*_):
        said.append(elsewhere(lambda: fs.activate(shared.model, "b")))

    handle = shared.model.down.register_forward_pre_hook(change)
    shared.model(shared.x)
    handle.remove()
    assert "another thread" in str(said[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_during_a_pass_of_another_thread_leaves_the_child_free():
    shared, inside, go = Shared(0), threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go.wait(20)

    handle = shared.model.down.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: shared.model(shared.x))
    thread.start()
    inside.wait(20)
    child = os.fork()
    if child == 0:
        try:
            fs.activate(shared.model, "b")
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    go.set()
    thread.join()
    handle.remove()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("block", ["rows", "disabled"])
def test_generators_closed_in_another_thread(block):
    shared = Shared(0)
    fs.activate(shared.model, "a")
    with torch.no_grad():
        y = shared.model(shared.x)

    def held():
        with fs.rows(shared.model, ROWS[1]) if block == "rows" else hosts.disabled(shared.model):
            yield

    generator = held()
    next(generator)
    assert elsewhere(generator.close) is None
    with torch.no_grad():
        assert torch.equal(shared.model(shared.x), y)
    assert elsewhere(lambda: fs.activate(shared.model, "b")) is None
