"""Trainer, Accelerate, mixed precision and loss scaling: the same numbers as a bare loop."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from suite import relative
from tiny import SIZE, built, hugging, words
from torch import nn

import finespun as fs
from finespun.driver import Driver

LSR = fs.LSR(rank=4, separation_rank=3)
ROWS = [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(words(16, 6))]
TEXTS = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]


def bert():
    """A tiny BERT without dropout, the same numbers every time."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hugging("BertForSequenceClassification", "BertConfig", **SIZE, **still)().eval()


def classifier():
    """A tiny BERT, adapted."""
    model = bert()
    return model, fs.adapt(model, LSR, "attention", ("classifier",))


def arguments(folder, **more):
    from transformers import TrainingArguments

    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "max_steps": 3,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
            **more,
        }
    )


def numbers(adapter):
    return torch.cat([p.detach().flatten() for p in adapter.parameters()])


def trained(folder, clip=None, **more):
    """Parameters after training a tiny Llama by Trainer; with `clip` a Driver watches and clips."""
    from transformers import Trainer

    model = built("llama")
    adapter = fs.adapt(model, LSR, "attention")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    driver = None if clip is None else Driver(model, "default", optimizer, max_grad_norm=clip)
    trainer = Trainer(
        model, arguments(folder, **more), train_dataset=TEXTS, optimizers=(optimizer, None)
    )
    trainer.train()
    return numbers(adapter), driver


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole, _ = trained(tmp_path)
    small, driver = trained(
        tmp_path, 0.0, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    start = numbers(fs.adapt(built("llama"), LSR, "attention"))
    assert driver.step == 3
    assert driver.checked
    assert relative(small, whole) < 1e-4
    assert relative(whole, start) > 1e-2


@pytest.mark.slow
def test_clipping_by_the_driver_is_clipping_by_trainer(tmp_path):
    by_trainer, _ = trained(tmp_path, max_grad_norm=0.05)
    by_driver, driver = trained(tmp_path, 0.05)
    free, _ = trained(tmp_path)
    assert driver.grad_norm > 0.05
    assert relative(by_driver, by_trainer) < 1e-5
    assert relative(free, by_trainer) > 1e-4


def test_a_driver_may_be_made_when_trainer_has_made_the_optimiser(tmp_path):
    from transformers import Trainer, TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)
            self.driver = Driver(model, "default", inner, max_grad_norm=1.0)

        def on_train_end(self, args, state, control, **kwargs):
            self.driver.close()

    model, adapter = classifier()
    before, watch = numbers(adapter), Watch()
    Trainer(model, arguments(tmp_path), train_dataset=ROWS, callbacks=[watch]).train()
    assert watch.driver.step == 3
    assert relative(numbers(adapter), before) > 1e-3


def test_training_goes_on_from_a_loaded_adapter(tmp_path):
    def steps(model, adapter, optimizer, seeds):
        for seed in seeds:
            ids = torch.randint(3, 40, (8, 6), generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(ids, labels=torch.arange(8) % 2).loss.backward()
            optimizer.step()
        return numbers(adapter)

    model, adapter = classifier()
    unbroken = steps(model, adapter, torch.optim.SGD(adapter.parameters(), 0.1), range(4))
    model, adapter = classifier()
    steps(model, adapter, torch.optim.SGD(adapter.parameters(), 0.1), range(2))
    adapter.save(tmp_path / "half")

    other = bert()
    frozen = fs.load(other, tmp_path / "half")
    assert not any(p.requires_grad for p in frozen.parameters())
    frozen.detach()
    again = fs.load(other, tmp_path / "half", trainable=True)
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    assert torch.equal(steps(other, again, optimizer, range(2, 4)), unbroken)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, _ in other.named_parameters() if "deltas." in n or "copies." in n
    }


# --- precision ------------------------------------------------------------------------------------


def loop(model, adapter, context, scaler=None, count=5):
    """Losses of a few steps on one batch."""
    optimizer, seen = torch.optim.AdamW(adapter.parameters(), 0.05), []
    for _ in range(count):
        optimizer.zero_grad()
        with context():
            loss = model(words(8, 6), labels=torch.arange(8) % 2).loss
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        seen.append(float(loss.detach()))
    return seen


def no_context():
    return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_full_precision(dtype):
    full = loop(*classifier(), no_context)
    model, adapter = classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if dtype == torch.float16 else None
    half = loop(model, adapter, lambda: torch.autocast("cpu", dtype=dtype), scaler)
    assert full[-1] < full[0] - 0.02
    assert half == pytest.approx(full, abs=0.02)
    assert half != full
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter.parameters())
    if scaler is not None:
        assert scaler.get_scale() == 1024.0


def test_a_step_that_overflows_is_skipped_and_the_scale_halved():
    model, adapter = classifier()
    optimizer = torch.optim.AdamW(adapter.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    driver, before = Driver(model, "default", optimizer), numbers(adapter)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(words(8, 6), labels=torch.arange(8) % 2).loss
    scaler.scale(loss).backward()
    next(iter(adapter.parameters())).grad.fill_(float("inf"))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(numbers(adapter), before)
    assert scaler.get_scale() == 512.0
    assert driver.step == 0
    assert not driver.checked


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_model_in_half_precision_keeps_the_trained_numbers_whole(moment):
    model = built("llama")
    if moment == "before":
        model.to(torch.bfloat16)
    adapter = fs.adapt(model, LSR, "all-linear")
    model.to(torch.bfloat16)
    plain = built("llama").to(torch.bfloat16).requires_grad_(False)
    assert torch.equal(model(words()).logits, plain(words()).logits)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(adapter.parameters(), 0.01)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(words(), labels=words()).loss
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < seen[0]
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


# --- two processes --------------------------------------------------------------------------------


def _work(rank, port, folder):
    from accelerate import Accelerator

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        ACCELERATE_USE_CPU="true",
    )
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model, adapter = classifier()
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    driver = Driver(model, "default", optimizer, max_grad_norm=0.0)
    data = torch.utils.data.DataLoader(ROWS, batch_size=4)
    wrapped, optimizer, data = accelerator.prepare(model, optimizer, data)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    for batch in data:
        optimizer.zero_grad()
        accelerator.backward(wrapped(**batch).loss)
        optimizer.step()
    torch.save({"numbers": numbers(adapter), "steps": driver.step}, f"{folder}/{rank}")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_accelerate_are_one_with_both_batches(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_work, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    assert torch.equal(found[0]["numbers"], found[1]["numbers"])
    assert [f["steps"] for f in found] == [2, 2]
    model, adapter = classifier()
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    for part in (ROWS[:8], ROWS[8:]):
        optimizer.zero_grad()
        ids = torch.stack([row["input_ids"] for row in part])
        model(ids, labels=torch.tensor([row["labels"] for row in part])).loss.backward()
        optimizer.step()
    assert relative(found[0]["numbers"], numbers(adapter)) < 1e-5
