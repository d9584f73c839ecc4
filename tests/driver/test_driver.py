"""The driver: when it calls hooks, clipping, dead parameters, and the checks of the first step."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from suite import DEVICE, WIDTH, batch, draw, net, relative, stir
from torch import nn

import finespun as fs
from finespun.contract import TrainingHooks
from finespun.driver import Driver
from finespun.errors import InputError, StateError, TrainingError

LORA, LSR = fs.LoRA(rank=3), fs.LSR(rank=4, separation_rank=3)


def ready(structure=LORA, optimizer=torch.optim.AdamW, lr=0.05, hooks=(), clip=0.0, **options):
    """A net in training, its adapter, the optimiser and the driver that watches it."""
    model = net().train()
    adapter = fs.adapt(model, structure, ["up", "down"], ("head",))
    stir(adapter.parameters())
    opt = optimizer(adapter.parameters(), lr=lr, **options)
    return model, adapter, opt, Driver(model, "default", opt, clip, hooks)


def step(model, optimizer, seed=2, goal=None):
    """One step on squared error; returns the loss."""
    optimizer.zero_grad()
    goal = draw(6, 5, seed=seed + 50) if goal is None else goal
    loss = (model(batch(seed=seed)) - goal).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


class Recorder(TrainingHooks):
    """Writes down every call."""

    def __init__(self):
        self.calls, self.state = [], 0

    def gradients_ready(self, context):
        self.calls.append(("ready", context.step))

    def after_step(self, context):
        self.calls.append(("after", context.step))

    def end(self, context):
        self.calls.append(("end",))

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        self.state = state["calls"]


@pytest.mark.parametrize("limit", [0.01, 0.5, 1e9])
def test_clipping_is_torchs(limit):
    model, adapter, optimizer, driver = ready(optimizer=torch.optim.SGD, clip=limit)
    other = net().train()
    same = fs.adapt(other, LORA, ["up", "down"], ("head",))
    stir(same.parameters())
    opposite = torch.optim.SGD(same.parameters(), lr=0.05)
    for seed in (2, 3, 4):
        step(model, optimizer, seed)
        opposite.zero_grad()
        (other(batch(seed=seed)) - draw(6, 5, seed=seed + 50)).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(same.parameters(), limit)
        opposite.step()
        assert driver.grad_norm == pytest.approx(float(norm), rel=1e-5)
        for a, b in zip(adapter.parameters(), same.parameters()):
            assert relative(a.grad, b.grad) <= 1e-6
            assert relative(a, b) <= 1e-6


def test_without_a_limit_gradients_are_left_alone():
    model, adapter, optimizer, driver = ready(clip=0.0)
    step(model, optimizer)
    total = torch.cat([p.grad.flatten() for p in adapter.parameters()]).norm()
    assert driver.grad_norm == pytest.approx(float(total), rel=1e-5)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="max_grad_norm"):
            Driver(model, "default", optimizer, bad)


def test_hooks_come_in_order_and_see_raw_gradients():
    seen = []

    class Raw(Recorder):
        def gradients_ready(self, context):
            super().gradients_ready(context)
            seen.append(max(float(p.grad.abs().max()) for p in adapter.parameters()))

    recorder = Raw()
    model, adapter, optimizer, driver = ready(hooks=[recorder], clip=1e-6)
    for seed in (2, 3):
        step(model, optimizer, seed)
    driver.close()
    assert recorder.calls == [("ready", 0), ("after", 0), ("ready", 1), ("after", 1), ("end",)]
    assert min(seen) > 1e-5
    step(model, optimizer, 4)
    assert len(recorder.calls) == 5
    assert driver.step == 2


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.5}),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.5}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.RMSprop, {"momentum": 0.5}),
    ],
)
@pytest.mark.parametrize("structure", [LORA, LSR])
def test_dead_numbers_stay_dead(structure, optimizer, options):
    model, adapter, opt, _ = ready(structure, optimizer, **options)
    step(model, opt, 2)
    kind = "rank" if structure is LORA else "term"
    name, delta = next(iter(adapter.deltas.items()))
    before = {n: p.detach().clone() for n, p in delta.named_parameters()}
    delta.switch_off(delta.groups(kind)[1])
    identity = [id(p) for p in adapter.parameters()]
    for seed in (3, 4, 5):
        step(model, opt, seed)
        for parameter_name, mask in delta.masks().items():
            p = delta.get_parameter(parameter_name)
            assert torch.count_nonzero(p[~mask]) == 0
            assert torch.count_nonzero(p.grad[~mask]) == 0
            for value in opt.state[p].values():
                if isinstance(value, torch.Tensor) and value.shape == p.shape:
                    assert torch.count_nonzero(value[~mask]) == 0
            assert (p[mask] != before[parameter_name][mask]).any()
    assert [id(p) for p in adapter.parameters()] == identity
    assert name in adapter.deltas


def test_dead_numbers_do_not_count_in_the_gradient_norm():
    model, adapter, optimizer, driver = ready()
    step(model, optimizer)
    for delta in adapter.deltas.values():
        for group in delta.groups("rank"):
            delta.switch_off(group)
    step(model, optimizer)
    heads = [p.grad.flatten() for p in adapter.attached.copies["head"].parameters()]
    assert driver.grad_norm == pytest.approx(float(torch.cat(heads).norm()), rel=1e-6)


def test_a_layer_that_never_ran_stops_the_training_and_is_named():
    model = net().train()
    model.blocks.append(type(model.blocks[0])().to(DEVICE))
    model.spare = nn.Linear(WIDTH, WIDTH).to(DEVICE)
    adapter = fs.adapt(model, LORA, ["up", "spare"], ())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    before = [p.detach().clone() for p in adapter.parameters()]
    Driver(model, "default", optimizer)
    with pytest.raises(TrainingError, match=r"1 of 4 layers never ran.*spare"):
        step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.parameters()))


def test_warm_up_at_rate_zero_is_not_the_first_step():
    model, adapter, optimizer, driver = ready(lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
        assert not driver.checked
        optimizer.param_groups[0]["lr"] = 0.1
        step(model, optimizer)
    assert driver.checked
    assert adapter.num_update_parameters > 0


def test_a_layer_that_did_not_move_is_warned_of():
    model, adapter, _, driver = ready()
    driver.close()
    name = "blocks.1.down"
    rest = [p for n, d in adapter.deltas.items() if n != name for p in d.parameters()]
    optimizer = torch.optim.AdamW(rest, lr=0.1)
    Driver(model, "default", optimizer)
    with pytest.warns(UserWarning, match=r"1 layers did not move.*blocks\.1\.down"):
        step(model, optimizer)


def test_an_evicted_adapter_cannot_be_trained():
    model, _, optimizer, _ = ready()
    fs.activate(model, None)
    fs.evict(model, "default")
    with pytest.raises(StateError, match="'default' is not active"):
        Driver(model, "default", optimizer)


def test_state_comes_back():
    recorder = Recorder()
    model, _, optimizer, driver = ready(hooks=[recorder])
    step(model, optimizer)
    saved = driver.state_dict()
    assert saved == {"step": 1, "hooks": [{"calls": 2}], "parameters": []}
    fresh = Recorder()
    _, _, _, resumed = ready(hooks=[fresh])
    resumed.load_state_dict(saved)
    assert (resumed.step, resumed.checked, fresh.state) == (1, True, 2)
    _, _, _, bare = ready()
    with pytest.raises(InputError, match="1 axes, this run 0"):
        bare.load_state_dict(saved)


class Penalty(TrainingHooks):
    """Adds half of the squared logits, counted."""

    def __init__(self):
        self.asked = 0

    def extra_loss(self, context, batch, outputs):
        self.asked += 1
        return 0.5 * outputs["logits"].square().mean()


class Wrapped(nn.Module):
    """A model that computes its own loss, as transformers' do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, labels=None):
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = self.inner(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_extra_loss_is_added_once_and_in_training_only(by_keyword):
    model = Wrapped(net()).train()
    adapter = fs.adapt(model, LORA, ["up"], ())
    stir(adapter.parameters())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    x, labels = batch(), torch.arange(6, device=DEVICE) % 5
    one, two = Penalty(), Penalty()
    driver = Driver(model, "default", optimizer, 0.0, [one, TrainingHooks(), two])
    outputs = model(x, labels=labels) if by_keyword else model(x, labels)
    logits = model.inner(x)
    wanted = F.cross_entropy(logits, labels) + logits.square().mean()
    assert float(outputs.loss) == pytest.approx(float(wanted), rel=1e-6)
    assert float(outputs["loss"]) == pytest.approx(float(wanted), rel=1e-6)
    assert (one.asked, two.asked) == (1, 1)
    assert model(x).loss is None
    assert float(driver.loss(None, outputs)) == pytest.approx(float(logits.square().mean()))
    own = torch.autograd.grad(outputs.loss, adapter.parameters())
    assert all(g.abs().sum() > 0 for g in own)
    model.eval()
    plain = model(x, labels=labels).loss
    assert float(plain) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    driver.close()
    assert float(model.train()(x, labels=labels).loss) == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("structure", [LORA, LSR])
def test_trainer_and_a_bare_loop_give_equal_numbers(structure, tmp_path):
    import transformers

    def tiny():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
        model = transformers.BertForSequenceClassification(config)
        adapter = fs.adapt(model, structure, ["query", "value"])
        assert adapter.attached.trained == ("classifier",)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        recorder = Recorder()
        driver = Driver(model, adapter.name, optimizer, 0.05, [recorder, Penalty()])
        return model, adapter, optimizer, driver, recorder

    g = torch.Generator().manual_seed(1)
    data = [
        {
            "input_ids": torch.randint(30, (7,), generator=g),
            "labels": torch.tensor(i % 3),
        }
        for i in range(16)
    ]
    model, adapter, optimizer, driver, recorder = tiny()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=DEVICE.type == "cpu",
        train_sampling_strategy="sequential",
    )
    transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    assert driver.step == 8
    assert recorder.calls[:2] == [("ready", 0), ("after", 0)]
    other, same, bare, watched, _ = tiny()
    other.to(DEVICE).train()
    for _ in range(2):
        for at in range(0, 16, 4):
            rows = data[at : at + 4]
            bare.zero_grad()
            inputs = {k: torch.stack([r[k] for r in rows]).to(DEVICE) for k in rows[0]}
            other(**inputs).loss.backward()
            bare.step()
    assert watched.grad_norm == pytest.approx(driver.grad_norm, rel=1e-5)
    for a, b in zip(adapter.parameters(), same.parameters()):
        assert relative(a, b) <= 1e-6
