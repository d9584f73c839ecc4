"""The order of hooks, and 0.1's faults, one test each."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hook_toys import (
    Alternate,
    Drift,
    Gain,
    Gates,
    Noise,
    Owner,
    Pull,
    Recorder,
    Shift,
    order,
    value_of,
)
from suite import DEVICE, draw, net, stir
from torch import nn

import finespun as fs
from finespun.contract import Need
from finespun.driver import Driver, Moments, prepare

LORA, LSR = fs.LoRA(rank=3), fs.LSR(rank=4, separation_rank=3)


class Losing(nn.Module):
    """A net that computes its own loss, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x, labels=None, num_items_in_batch=None):
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = self.inner(x)
        loss = None
        if labels is not None:
            count = len(labels) if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(logits, labels, reduction="sum") / count
        return SequenceClassifierOutput(loss=loss, logits=logits)


def ready(*hooks, structure=LORA, lr=0.02, clip=0.0, optimizer=None, model=None, **options):
    """A model in training, its adapter, the optimiser and the driver of these hooks."""
    model = (Losing() if model is None else model).train()
    adapter = fs.adapt(model, structure, ["up", "down"], ())
    stir(adapter.parameters())
    prepared = prepare(model, "default", hooks, **options)
    opt = prepared.optimizer(lr) if optimizer is None else optimizer(prepared.groups(lr))
    return model, adapter, opt, Driver(model, "default", opt, clip, prepared)


def rows(seed, count=6):
    return {"x": draw(count, 3, 24, seed=seed), "labels": torch.arange(count, device=DEVICE) % 5}


def backward(model, seed, share=1.0):
    (model(**rows(seed)).loss * share).backward()


def step(model, optimizer, seed, micros=1):
    optimizer.zero_grad()
    for micro in range(micros):
        backward(model, 10 * seed + micro, 1 / micros)
    optimizer.step()


def parameters(adapter):
    return [p.detach().clone() for p in adapter.parameters()]


# --- order ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("announced", [False, True])
def test_hooks_are_called_in_the_order_of_a_step(micros, announced):
    recorder = Recorder()
    model, _, optimizer, driver = ready(recorder)
    for seed in range(2):
        optimizer.zero_grad()
        for micro in range(micros):
            if announced:
                driver.micro_batch(first=micro == 0)
            backward(model, seed)
        optimizer.step()
    driver.close()
    assert recorder.log == order(2, micros)
    step(model, optimizer, 3)
    assert recorder.log == order(2, micros)


def test_axes_come_in_a_fixed_order_whatever_order_they_are_named_in():
    log = []
    names = ["objective", "dynamics", "initializer", "allocation"]
    values = [value_of(axis, axis[:4], log) for axis in names]
    model, _, optimizer, driver = ready(*values)
    step(model, optimizer, 1)
    driver.close()
    first = [name.split()[0] for name, *_ in log]
    assert first == ["init", "allo", "dyna", "obje"] * (len(log) // 4)
    assert [name.split()[1] for name, *_ in log[::4]] == [name for name, *_ in order(1, 1)]


def test_a_micro_batch_of_two_passes_is_one_where_the_loop_says_so():
    recorder = Recorder()
    model, _, optimizer, driver = ready(recorder)
    driver.micro_batch(first=True)
    (model(**rows(1)).loss + model(**rows(2)).loss).backward()
    optimizer.step()
    calls = [name for name, *_ in recorder.log]
    assert calls.count("before_forward") == 1
    assert calls.count("extra_loss") == 2


def test_passes_inside_hooks_and_evaluations_call_no_hooks():
    class Curious(Recorder):
        needs = frozenset({Need.ROOT_LOSS, Need.TEACHER})

        def before_step(self, context):
            super().before_step(context)
            context.model(**rows(1))

        def extra_loss(self, context, batch, outputs):
            context.call(batch)
            context.teacher(batch)
            return super().extra_loss(context, batch, outputs)

    recorder = Curious()
    model, _, optimizer, driver = ready(recorder)
    step(model, optimizer, 1)
    model.eval()
    model(**rows(3))
    model.train()
    with torch.no_grad():
        model(**rows(3))
    step(model, optimizer, 2)
    driver.close()
    assert recorder.log == order(2, 1)


def test_end_is_not_called_after_an_error_and_everything_is_taken_away():
    recorder, noise = Recorder(), Noise()
    model, adapter, optimizer, driver = ready(recorder, noise, Gain())

    def fail():
        with driver:
            step(model, optimizer, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for delta in adapter.deltas.values():
        slots = delta.site.slots
        assert not any((slots.gains, slots.overlays, slots.mixers))
    calls = list(recorder.log)
    driver.close()
    step(model, optimizer, 2)
    assert recorder.log == calls
    assert "end" not in [name for name, *_ in calls]


def test_what_ends_with_an_error_is_taken_away_too():
    class Bad(Noise):
        def end(self, context):
            raise ZeroDivisionError

    _, adapter, _, driver = ready(Bad())
    with pytest.raises(ZeroDivisionError):
        driver.close()
    assert not any(d.site.slots.overlays for d in adapter.deltas.values())
    assert not driver.open


# --- steps ----------------------------------------------------------------------------------------
def test_a_step_that_calls_its_parents_step_counts_once():
    class Sub(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # its class's step has torch's hooks now
    recorder = Recorder()
    model, _, optimizer, driver = ready(recorder, optimizer=Sub)
    for seed in range(3):
        step(model, optimizer, seed)
    driver.close()
    assert driver.step == 3
    assert recorder.log == order(3, 1)


@pytest.mark.parametrize("where", ["hook", "step"])
def test_a_step_left_by_an_error_does_not_swallow_the_next(where):
    class Sub(torch.optim.AdamW):
        fail = False

        def step(self, closure=None):
            if self.fail and where == "step":
                raise ZeroDivisionError
            return super().step(closure)

    class Failing(Recorder):
        def gradients_ready(self, context):
            if Sub.fail and where == "hook":
                raise ZeroDivisionError
            super().gradients_ready(context)

    recorder = Failing()
    model, _, optimizer, driver = ready(recorder, optimizer=Sub)
    Sub.fail = True
    with pytest.raises(ZeroDivisionError):
        step(model, optimizer, 1)
    Sub.fail = False
    step(model, optimizer, 2)
    assert driver.step == 1
    assert [name for name, *_ in recorder.log].count("after_step") == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("unscaled", [True, False])
def test_a_scaled_loss_is_clipped_at_its_true_gradient(fused, unscaled):
    """0.1 clipped what a fused optimiser still had to divide by the scale: 2.4e-6 for 1e-2."""
    recorder = Pull(weight=0.0)
    recorder.extra_loss = lambda *_: None
    seen = []
    recorder.gradients_ready = lambda c: seen.append(driver_norm(c.adapter.parameters()))
    model, adapter, optimizer, driver = ready(
        recorder, clip=1e-2, optimizer=lambda g: torch.optim.SGD(g, lr=1.0, fused=fused)
    )
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12)
    before = parameters(adapter)
    scaler.scale(model(**rows(1)).loss).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    moved = torch.cat([(a - b).flatten() for a, b in zip(adapter.parameters(), before)]).norm()
    assert float(moved.detach()) == pytest.approx(1e-2, rel=1e-3)
    assert seen == [pytest.approx(driver.grad_norm, rel=1e-5)]
    assert 1e-2 < driver.grad_norm < 100


def driver_norm(parameters):
    return float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("hooks", [(Recorder,), (Recorder, Shift)])
def test_a_skipped_step_is_no_step(fused, hooks):
    recorder = hooks[0]()
    model, adapter, optimizer, driver = ready(
        recorder, *(h() for h in hooks[1:]), optimizer=lambda g: torch.optim.AdamW(g, fused=fused)
    )
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    for bad in (False, True, False):
        before = parameters(adapter)
        optimizer.zero_grad()
        scaler.scale(model(**rows(2)).loss).backward()
        if bad:
            adapter.parameters()[0].grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(adapter.parameters(), before))
        assert same == bad or (bad and len(hooks) == 2 and not fused)
    driver.close()
    assert driver.step == 2
    names = [name for name, *_ in recorder.log]
    assert (names.count("gradients_ready"), names.count("after_step")) == (2, 2)
    assert [at for name, *at in recorder.log if name == "before_step"] == [[0, 0], [1, 0], [1, 0]]


# --- resume ---------------------------------------------------------------------------------------
HOOKS = {
    "gain": Gain,
    "overlay": Noise,
    "gates": Gates,
    "state": Drift,
    "perturbation": Shift,
    "hold": Alternate,
    "own parameter": Owner,
    "extra loss": lambda: Pull(0.01),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_resumed_run_is_bit_equal(kind):
    def run(count, state=None):
        hooks = HOOKS[kind]()
        model, adapter, optimizer, driver = ready(hooks)
        if state is not None:
            adapter.attached.load(state[0])
            optimizer.load_state_dict(state[1])
            driver.load_state_dict(state[2])
        while driver.step < count:
            step(model, optimizer, driver.step, micros=2)
        kept = adapter.attached.tensors(), optimizer.state_dict(), driver.state_dict()
        return copy.deepcopy(kept), hooks

    whole, one = run(6)
    half, _ = run(3)
    taken, other = run(6, half)
    for key, tensor in whole[0].items():
        assert torch.equal(tensor, taken[0][key]), key
    assert any((tensor != half[0][key]).any() for key, tensor in whole[0].items())
    assert one.state_dict() == other.state_dict()


# --- 0.1's hooks, copies --------------------------------------------------------------------------
def test_moments_of_0_1_work_with_a_warning():
    class Old(Moments):
        calls: list = []

        def gradients_ready(self, step):
            self.calls.append(("ready", step))

        def after_step(self, step):
            self.calls.append(("after", step))

        def extra_loss(self, batch, outputs):
            return outputs["logits"].square().mean()

        def end(self):
            self.calls.append(("end",))

    model = Losing().train()
    adapter = fs.adapt(model, LORA, ["up"], ())
    optimizer = torch.optim.AdamW(adapter.parameters())
    with pytest.warns(DeprecationWarning, match=r"Old.*TrainingHooks"):
        driver = Driver(model, "default", optimizer, moments=[Old()])
    step(model, optimizer, 1)
    driver.close()
    assert Old.calls == [("ready", 0), ("after", 1), ("end",)]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_model_in_training_are_watched_by_nobody(twin_of):
    recorder, noise = Recorder(), Noise()
    model, _, optimizer, driver = ready(recorder, noise)
    step(model, optimizer, 1)
    twin, calls, seen = twin_of(model), list(recorder.log), len(noise.seen)
    twin.train()(**rows(3)).loss.backward()
    assert (recorder.log, len(noise.seen)) == (calls, seen)
    step(model, optimizer, 2)
    driver.close()
    assert recorder.log == order(2, 1)
