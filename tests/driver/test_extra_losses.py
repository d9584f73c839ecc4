"""Extra losses, and parameters and optimisers that hooks bring."""

import pytest
import torch
from hook_toys import Owner, Pull, SignDescent, Stepper
from suite import DEVICE, batch, draw, net
from test_hooks import LORA, Losing, parameters, ready, rows, step

import finespun as fs
from finespun.contract import ParamGroup, TrainingHooks
from finespun.driver import Driver, prepare, set_lr
from finespun.errors import InputError, TrainingError


# --- extra losses ---------------------------------------------------------------------------------
@pytest.mark.parametrize("micros", [1, 2, 4])
def test_an_extra_loss_counts_once_a_step(micros):
    """By the loop's own weights, and by transformers' num_items_in_batch, which divide nothing."""
    pull = Pull()
    model, _, optimizer, _ = ready(pull)
    step(model, optimizer, 1, micros)
    optimizer.zero_grad()
    count = torch.tensor(6 * micros, device=DEVICE)
    for micro in range(micros):
        model(**rows(micro), num_items_in_batch=count).loss.backward()
    optimizer.step()
    assert pull.seen == pytest.approx([1.0, 1.0], rel=1e-3)


def test_an_extra_loss_that_never_comes_stops_the_first_step():
    model, adapter, optimizer, driver = ready(Pull(), model=net())
    before = parameters(adapter)
    model(batch()).square().mean().backward()
    with pytest.raises(TrainingError, match=r"extra loss of Pull was never added.*driver\.loss"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), before))
    outputs = model(batch())
    (outputs.square().mean() + driver.loss(None, outputs)).backward()
    optimizer.step()
    assert driver.step == 1


def test_labels_must_be_there_to_weigh_by():
    model, _, _, _ = ready(Pull())
    outputs = {"x": draw(6, 3, 24, seed=1)}
    assert model(**outputs).loss is None

    class Given(Losing):
        def forward(self, x, num_items_in_batch=None):
            return super().forward(x, torch.arange(6, device=DEVICE) % 5, num_items_in_batch)

    model, _, _, _ = ready(Pull(), model=Given())
    with pytest.raises(TrainingError, match="num_items_in_batch without labels"):
        model(**outputs, num_items_in_batch=6)


# --- parameters and steppers ----------------------------------------------------------------------
def test_parameters_that_hooks_own_are_trained_saved_and_resumed():
    owner = Owner()
    model, _, optimizer, driver = ready(owner, lr=0.05)
    group = next(g for g in optimizer.param_groups if any(p is owner.theta for p in g["params"]))
    assert (group["lr"], group["lr_factor"], group["weight_decay"]) == (0.1, 2.0, 0.0)
    for seed in range(80):
        step(model, optimizer, seed)
    assert float(owner.theta.detach()) == pytest.approx(3.0, abs=0.2)
    set_lr(optimizer, 0.01)
    assert group["lr"] == pytest.approx(0.02)
    again = Owner()
    _, _, _, other = ready(again)
    other.load_state_dict(driver.state_dict())
    assert torch.equal(again.theta, owner.theta)
    _, _, _, bare = ready(TrainingHooks())
    with pytest.raises(InputError, match="own parameters"):
        bare.load_state_dict(driver.state_dict())


def test_parameters_outside_the_optimiser_are_refused():
    model = Losing().train()
    adapter = fs.adapt(model, LORA, ["up"], ())
    optimizer = torch.optim.AdamW(adapter.parameters())
    with pytest.raises(InputError, match=r"own 1 parameters.*prepare\(model"):
        Driver(model, "default", optimizer, hooks=[Owner()])


def test_a_factor_of_zero_freezes():
    class Frozen(TrainingHooks):
        def prepare(self, setup):
            self.down = [d.get_parameter("A") for d in setup.adapter.deltas.values()]

        def parameters(self):
            return [ParamGroup(self.down, lr_factor=0.0)]

    model, adapter, optimizer, driver = ready(Frozen())
    assert {p.requires_grad for d in adapter.deltas.values() for p in [d.A]} == {False}
    assert not any(p is d.A for d in adapter.deltas.values() for p in driver.parameters())
    step(model, optimizer, 1)
    assert all(d.B.grad is not None for d in adapter.deltas.values())


def test_a_stepper_is_the_optimiser_and_schedules_keep_its_factors():
    owner = Owner()
    model, adapter, optimizer, _ = ready(Stepper(factor=4.0), owner, lr=0.01)
    assert isinstance(optimizer, SignDescent)
    before = parameters(adapter)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t == 0 else 0.5)
    step(model, optimizer, 1)
    for p, old, (name, _) in zip(adapter.parameters(), before, _names(adapter)):
        size = 0.04 if name == "B" else 0.01
        assert float((p - old).detach().abs().max()) == pytest.approx(size, rel=1e-3)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.005, 0.02, 0.01])
    assert all(state["steps"] == 1 for state in optimizer.state.values())
    with pytest.raises(InputError, match="are each an optimiser"):
        prepare(model, "default", [Stepper(), Stepper(factor=2.0)])
    other = torch.optim.AdamW(adapter.parameters())
    with pytest.raises(InputError, match="toy_stepper is an optimiser of its own"):
        Driver(model, "default", other, hooks=[Stepper()])


def _names(adapter):
    return [pair for d in adapter.deltas.values() for pair in d.named_parameters()]
