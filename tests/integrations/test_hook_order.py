"""One order of hooks, and one weight of extra losses, under a bare loop, Trainer and TRL."""

import pytest
import torch
from hook_toys import Pull, Recorder, order
from tiny import built

import finespun as fs
from finespun.driver import Driver, prepare
from finespun.errors import TrainingError

ROWS = [[4 + (i + j) % 30 for j in range(8)] for i in range(24)]
STEPS, SIZE = 3, 2


def watched(hooks, trainer):
    """A tiny Llama, the optimiser of its adapter, and the driver."""
    model = built("llama")
    fs.adapt(model, fs.LoRA(rank=2), "attention")
    prepared = prepare(model, "default", [hooks], steps=STEPS)
    optimizer = prepared.optimizer(1e-3)
    return (
        model,
        optimizer,
        Driver(model, "default", optimizer, 0.0, prepared, own_loss=trainer == "trl"),
    )


def options(folder, micros):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": micros,
        "max_steps": STEPS,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }


def bare(model, optimizer, driver, micros, folder):
    model.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(micros):
            at = (step * micros + micro) * SIZE
            ids = torch.tensor(ROWS[at : at + SIZE])
            (model(input_ids=ids, labels=ids).loss / micros).backward()
        optimizer.step()


def by_trainer(model, optimizer, driver, micros, folder):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in ROWS]
    arguments = TrainingArguments(**options(folder, micros))
    Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
        optimizers=(optimizer, None),
    ).train()


def by_trl(model, optimizer, driver, micros, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl_words import tokenizer

    class Ours(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if model.training:
                loss = loss + driver.loss(inputs, outputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    rows = Dataset.from_list([{"input_ids": ids} for ids in ROWS])
    Ours(
        model=model,
        args=SFTConfig(
            **options(folder, micros), max_length=16, bf16=False, gradient_checkpointing=False
        ),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
    ).train()


TRAINERS = {"bare": bare, "trainer": by_trainer, "trl": by_trl}


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_hooks_are_called_in_one_order(trainer, micros, tmp_path):
    recorder = Recorder()
    model, optimizer, driver = watched(recorder, trainer)
    with driver:
        TRAINERS[trainer](model, optimizer, driver, micros, tmp_path)
    assert recorder.log == order(STEPS, micros)


@pytest.mark.parametrize("micros", [1, 4])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_extra_loss_counts_once_a_step(trainer, micros, tmp_path):
    """0.1 added it k-fold where Trainer accumulates k micro-batches."""
    pull = Pull()
    model, optimizer, driver = watched(pull, trainer)
    with driver:
        TRAINERS[trainer](model, optimizer, driver, micros, tmp_path)
    assert pull.seen == pytest.approx([1.0] * STEPS, rel=1e-2)


def test_an_extra_loss_that_trl_leaves_out_stops_the_first_step(tmp_path):
    """SFTTrainer computes its own loss; the model returns one beside it, which nothing uses."""
    pull = Pull()
    model, optimizer, driver = watched(pull, "trainer")
    driver.loss = lambda *_: 0.0
    with pytest.raises(TrainingError, match="extra loss of Pull was never added"):
        by_trl(model, optimizer, driver, 1, tmp_path)
