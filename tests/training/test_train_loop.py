"""The loop: schedule, accumulation, modes, refusals, and a state that is the whole truth."""

import itertools
import math
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import finespun as fs
from finespun.contract import ParamGroup
from finespun.driver import adamw, param_groups, set_lr
from finespun.driver.groups import MOST_DECAYING_LR
from finespun.errors import InputError, StateError, TrainingError
from finespun.recipes.training import Training
from finespun.tasks.batches import Position
from finespun.tasks.classify import outputs_of
from finespun.tasks.task import Batch, Task
from finespun.training.loop import Interrupted, Loop, lr_factor, train_mode
from finespun.training.progress import Reporter


class Net(nn.Module):
    """Two layers with dropout between and a norm with running statistics."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.second(self.drop(torch.tanh(self.norm(self.first(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


class Rows:
    """Batches of fixed sizes, the same in every epoch: what Loop asks of Batches. The label is the
    largest of the first three numbers."""

    task: Task[Any, Any] = Task()

    def __init__(self, *sizes: int) -> None:
        g = torch.Generator().manual_seed(3)
        xs = [torch.randn(n, 6, generator=g) for n in sizes]
        self.given = [{"x": x, "labels": x[:, :3].argmax(1)} for x in xs]
        self.position = Position()

    def __len__(self) -> int:
        return len(self.given)

    def restore(self, position: Position) -> None:
        self.position = position

    def epoch(self) -> Iterator[Batch]:
        number = self.position.epoch
        for index in range(self.position.batch, len(self.given)):
            self.position = Position(number, index + 1)
            yield self.given[index]
        self.position = Position(number + 1, 0)


class Events(Reporter):
    """Keeps every record; `at` may act when an event comes."""

    def __init__(self, at: Any = None) -> None:
        self.records: list[Any] = []
        self.at = at

    def tell(self, record: Any) -> None:
        self.records.append(record)
        if self.at is not None:
            self.at(record)


def make(
    rows: Any,
    dropout: float = 0.0,
    lr: float = 1e-2,
    net: nn.Module | None = None,
    **training: Any,
) -> Loop:
    torch.manual_seed(2)
    model = Net(dropout) if net is None else net
    adapter = fs.adapt(
        model, fs.LSR(rank=2, separation_rank=2), ["first"], train_modules=["second"]
    )
    options = {k: training.pop(k) for k in ("reporter", "save", "head_lr") if k in training}
    return Loop(adapter, rows, Training(**training), lr, **options)


def steps_into(saved: list[int]) -> Any:
    return lambda state: saved.append(state["step"])


def numbers(loop: Loop) -> list[Tensor]:
    return [p.detach().clone() for p in loop.adapter.parameters()]


# --- schedule ------------------------------------------------------------------------------------
@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.9),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
)
def test_the_rate_rises_to_its_peak_and_never_ends_at_zero(
    steps: int, warmup: float, schedule: Any
) -> None:
    training = Training(warmup_share=warmup, schedule=schedule)
    factors = [lr_factor(i, steps, training) for i in range(steps)]
    rise = round(warmup * steps)
    assert all(0 < f <= 1 for f in factors)
    assert factors[:rise] == [(i + 1) / rise for i in range(rise)]
    if rise < steps:
        assert factors[rise] == 1
    after = factors[rise:]
    if schedule == "constant":
        assert set(after) <= {1.0}
    else:
        assert all(a > b for a, b in itertools.pairwise(after))


def test_linear_and_cosine_in_closed_form() -> None:
    linear = Training(warmup_share=0, schedule="linear")
    assert [lr_factor(i, 4, linear) for i in range(4)] == [1, 0.75, 0.5, 0.25]
    cosine = Training(warmup_share=0, schedule="cosine")
    assert [lr_factor(i, 4, cosine) for i in range(4)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )


def test_every_step_has_the_rate_of_the_schedule() -> None:
    events = Events()
    loop = make(Rows(4, 4, 4), epochs=2, warmup_share=0.34, lr=0.02, reporter=events)
    loop.run()
    told = [r["lr"] for r in events.records if r["event"] == "step"]
    assert told == [0.02 * lr_factor(i, 6, loop.training) for i in range(6)]
    assert loop.step == loop.steps == 6


# --- steps ---------------------------------------------------------------------------------------
def test_accumulated_batches_equal_one_batch_with_all_rows() -> None:
    """The gradient of unequal batches, weighted by rows, is that of their union."""
    parts = Rows(5, 2, 1)
    whole = Rows(8)
    whole.given = [{k: torch.cat([batch[k] for batch in parts.given]) for k in ("x", "labels")}]
    several, one = (
        make(rows, epochs=4, accumulate=n, warmup_share=0) for rows, n in ((parts, 3), (whole, 1))
    )
    for loop in (several, one):
        loop.adapter.model.norm.eval()
        loop.run()
    assert several.steps == one.steps == 4
    assert several.losses == pytest.approx(one.losses, rel=1e-5)
    for a, b in zip(numbers(several), numbers(one)):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_last_group_may_be_smaller() -> None:
    loop = make(Rows(4, 4, 4, 4, 4), epochs=2, accumulate=2)
    loop.run()
    assert loop.steps_per_epoch == 3
    assert loop.step == 6


def test_training_lowers_the_loss_and_moves_the_adapter_alone() -> None:
    loop = make(Rows(16, 16), epochs=30, lr=0.05)
    model, mine = loop.adapter.model, {id(p) for p in loop.adapter.parameters()}
    base = {n: v.clone() for n, v in model.state_dict().items()}
    kept = {n for n, p in model.named_parameters() if id(p) in mine}
    loop.run()
    assert sum(loop.losses[-2:]) < 0.5 * sum(loop.losses[:2])
    for name, value in model.state_dict().items():
        assert torch.equal(value, base[name]) == (name not in kept), name


def test_dropout_of_the_base_acts_while_training_and_modes_come_back() -> None:
    loop = make(Rows(4), dropout=0.5)
    model = loop.adapter.model.eval()
    with train_mode(loop.adapter):
        assert model.drop.training
        assert not model.norm.training  # frozen, so its statistics stay
        assert model.first.training
    assert not any(module.training for module in model.modules())
    model.train()
    outputs_of(model, iter([([0, 1], {"x": torch.zeros(2, 6)})]), 2)
    assert all(module.training for module in model.modules())


def test_a_norm_that_is_trained_keeps_statistics() -> None:
    torch.manual_seed(0)
    model = Net()
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["first"], train_modules=["norm"])
    with train_mode(adapter):
        copy = adapter.attached.copies["norm"]
        assert copy.training


def test_outputs_are_put_back_in_the_order_of_rows() -> None:
    loop = make(Rows(4))
    model = loop.adapter.model.eval()
    x = torch.randn(5, 6)
    batches = iter([([3, 1], {"x": x[[3, 1]]}), ([0, 4, 2], {"x": x[[0, 4, 2]]})])
    with torch.no_grad():
        assert torch.allclose(outputs_of(model, batches, 5), model(x).logits, atol=1e-6)


def test_vectors_do_not_decay() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = adamw(param_groups([matrix, vector], (), 5e-3, 0.5), 5e-3)
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 1 - 5e-3 * 0.5))
    assert torch.equal(vector, torch.ones(2))


@pytest.mark.parametrize("lr", [1e-4, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("head_lr", [None, 1e-3, 0.5])
def test_a_large_rate_does_not_decay_more_than_a_usual_one(
    lr: float, head_lr: float | None
) -> None:
    """A matrix without a gradient loses lr * decay of itself in a step, as if lr were at most the
    largest that decays."""
    update, head = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    wishes = [ParamGroup([head], (head_lr or lr) / lr)]
    optimizer = adamw(param_groups([update, head], wishes, lr, 0.01), lr)
    set_lr(optimizer, lr)
    update.grad, head.grad = torch.zeros(2, 2), torch.zeros(2, 2)
    optimizer.step()
    for parameter, own in ((update, lr), (head, head_lr or lr)):
        wanted = torch.full((2, 2), 1 - 0.01 * min(own, MOST_DECAYING_LR))
        assert torch.allclose(parameter, wanted, atol=1e-7)


@pytest.mark.parametrize("head_lr", [None, 1e-2, 3e-4])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_head_learns_at_its_own_rate_on_the_same_schedule(
    head_lr: float | None, schedule: Any
) -> None:
    loop = make(Rows(4, 4, 4), epochs=2, schedule=schedule, head_lr=head_lr)
    heads = {id(p) for m in loop.adapter.attached.copies.values() for p in m.parameters()}
    stream = loop.batches.epoch()
    for step in range(3):
        loop.take([next(stream)])
        share = lr_factor(step, loop.steps, loop.training)
        found = {id(p): g["lr"] for g in loop.optimizer.param_groups for p in g["params"]}
        assert heads < found.keys()
        for key, lr in found.items():
            wanted = (head_lr or loop.lr) if key in heads else loop.lr
            assert lr == pytest.approx(wanted * share)


def test_a_head_alone_learns_at_the_rate_that_is_given() -> None:
    adapter = fs.adapt(Net(), fs.LoRA(rank=2), [], train_modules=["second"])
    loop = Loop(adapter, Rows(4), Training(epochs=1), 1e-2, head_lr=1e-4)
    loop.run()
    assert {group["lr"] for group in loop.optimizer.param_groups} == {1e-2}


# --- what cannot go on ---------------------------------------------------------------------------
def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to train"):
        param_groups([])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value: float) -> None:
    rows, saved = Rows(4, 4, 4, 4), []
    rows.given[2]["x"] = torch.full((4, 6), value)
    loop = make(rows, epochs=1, checkpoint_every=2, save=steps_into(saved))
    with pytest.raises(TrainingError) as caught:
        loop.run()
    told = str(caught.value)
    assert "loss is nan in step 3 of 4" in told
    assert f"at learning rate {lr_factor(2, 4, loop.training) * 1e-2:.3g}" in told
    assert "try training.lr=0.003" in told
    assert "the checkpoint of step 2 is kept" in told
    assert saved == [2]
    assert caught.value.exit_code == 4


def test_gradients_that_are_not_finite_stop_the_run() -> None:
    class Cliff(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            found = super().forward(x, labels)
            return SimpleNamespace(loss=(found.loss * 0).sqrt(), logits=found.logits)

    loop = make(Rows(4), epochs=1, net=Cliff())
    with pytest.raises(TrainingError, match="gradient norm is nan in step 1 of 1"):
        loop.run()


def test_numbers_that_are_not_finite_are_never_saved() -> None:
    saved: list[int] = []

    def spoil(record: Any) -> None:
        if record["event"] == "step" and record["step"] == 2:
            loop.adapter.parameters()[0].data.view(-1)[0] = math.inf

    rows = Rows(4, 4, 4)
    loop = make(rows, checkpoint_every=1, reporter=Events(spoil), save=steps_into(saved))
    with pytest.raises(TrainingError, match="the largest number is inf in step 2 of 9"):
        loop.run()
    assert saved == [1]


def test_a_rate_beyond_reason_ends_in_an_error_not_in_nan() -> None:
    with pytest.raises(TrainingError, match=r"try training\.lr=3e\+37"):
        make(Rows(4, 4), epochs=20, lr=1e38, warmup_share=0).run()


def test_a_loop_runs_once() -> None:
    loop = make(Rows(4, 4), epochs=1)
    loop.run()
    with pytest.raises(StateError, match="this loop has run"):
        loop.run()


# --- interrupts ----------------------------------------------------------------------------------
def test_ctrl_c_finishes_the_step_saves_and_stops() -> None:
    def press(record: Any) -> None:
        if record["event"] == "step" and record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    saved: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    loop = make(
        Rows(4, 4), epochs=4, reporter=Events(press), save=lambda s: saved.append(s["step"])
    )
    with pytest.raises(Interrupted, match="after step 3") as caught:
        loop.run()
    assert caught.value.step == 3
    assert saved == [2, 3]
    assert signal.getsignal(signal.SIGINT) is before
    assert issubclass(Interrupted, KeyboardInterrupt)


@pytest.fixture
def listening() -> Iterator[None]:
    """SIGINT is heard, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_a_second_ctrl_c_stops_at_once() -> None:
    def press(record: Any) -> None:
        if record["event"] == "step":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    loop = make(Rows(4, 4), epochs=1, reporter=Events(press))
    with pytest.raises(KeyboardInterrupt) as caught:
        loop.run()
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- state ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_the_state_is_all_that_the_rest_depends_on(stop: int) -> None:
    states: dict[int, Any] = {}

    def keep(state: Any) -> None:
        states[state["step"]] = {
            **state,
            "adapter": {k: v.clone() for k, v in state["adapter"].items()},
        }

    options: dict[str, Any] = {"dropout": 0.3, "epochs": 3, "checkpoint_every": 1}
    whole = make(Rows(4, 4), **options, save=lambda state: None)
    whole.run()
    half = make(Rows(4, 4), **options, reporter=Events(stop_after(stop)), save=keep)
    with pytest.raises(Interrupted):
        half.run()
    rest = make(Rows(4, 4), **options)
    torch.manual_seed(99)
    rest.load_state_dict(states[stop])
    rest.run()
    assert rest.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(numbers(rest), numbers(whole)))


def stop_after(step: int) -> Any:
    def press(record: Any) -> None:
        if record["event"] == "step" and record["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return press


def test_a_state_of_another_adapter_is_refused() -> None:
    state = make(Rows(4)).state_dict()
    model = Net()
    adapter = fs.adapt(model, fs.LoRA(rank=1), ["first"], train_modules=["second"])
    other = Loop(adapter, Rows(4), Training(), 1e-2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="first"):
        other.load_state_dict(state)


def test_checkpoints_tell_the_condition_of_every_layer() -> None:
    events = Events()
    loop = make(Rows(4, 4), epochs=2, reporter=events)
    loop.run()
    told = [r for r in events.records if r["event"] == "checkpoint"]
    assert [r["step"] for r in told] == [2, 4]
    delta = loop.adapter.deltas["first"]
    assert told[-1]["diagnostics"] == {"first": delta.diagnostics()}
    assert delta.diagnostics().keys() == {"condition_A", "condition_B"}
