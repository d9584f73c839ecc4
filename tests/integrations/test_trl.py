"""TRL's trainers on an adapted model: supervised and preference tuning, and DPO's reference."""

import copy
from typing import Any

import pytest
import torch
from tiny import built
from torch import Tensor, nn
from trl_words import tokenizer

import finespun as fs
from finespun.driver import Driver
from finespun.errors import TrainingError

pytestmark = pytest.mark.slow


def sentence(start: int, length: int) -> str:
    return " ".join(f"w{(start + i) % 36}" for i in range(length))


def options(folder, **more):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **more,
    }


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_the_adapter_and_nothing_else(tmp_path, checkpointing):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = built("llama")
    adapter = fs.adapt(model, fs.LSR(rank=4, separation_rank=3), "all-linear")
    base, before = frozen(model), [p.detach().clone() for p in adapter.parameters()]
    rows = [{"input_ids": [4 + (i + j) % 30 for j in range(9)]} for i in range(2)]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **options(tmp_path, learning_rate=0.03, max_length=16, max_steps=8)
            | {"gradient_checkpointing": checkpointing}
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    assert {id(p) for p in trainer.model.parameters() if p.requires_grad} == {
        id(p) for p in adapter.parameters()
    }
    trainer.train()
    seen = losses(trainer)
    assert seen[-1] < seen[0] - 0.05
    assert all(torch.equal(model.get_parameter(n), p) for n, p in base.items())
    assert not all(torch.equal(a, b) for a, b in zip(adapter.parameters(), before))
    adapter.save(tmp_path / "adapter")
    other = built("llama")
    fs.load(other, tmp_path / "adapter")
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model.eval()(ids).logits)


def pairs(count: int = 4) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": sentence(i, 3),
                "chosen": " " + sentence(i + 3, 4),
                "rejected": " " + sentence(2 * i + 9, 4),
            }
            for i in range(count)
        ]
    )


def watched(**arguments) -> Any:
    """A DPO trainer that keeps what it was asked for and all its batches."""
    from trl import DPOTrainer

    class Watched(DPOTrainer):
        """Keeps the log-probabilities of the reference beside those of the base for every batch."""

        plain: nn.Module

        def compute_ref_log_probs(self, model, inputs):
            self.asked = getattr(self, "asked", 0) + 1
            return super().compute_ref_log_probs(model, inputs)

        def _compute_loss(self, model, inputs, return_outputs):
            self.batches = [
                *getattr(self, "batches", []),
                {k: v.clone() for k, v in inputs.items()},
            ]
            return super()._compute_loss(model, inputs, return_outputs)

    return Watched(**arguments)


def log_probabilities(model: nn.Module, batch) -> Tensor:
    """Σ log p of each row's completion."""
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen = batch["input_ids"][:, 1:, None]
    each = logits[:, :-1].log_softmax(-1).gather(-1, chosen)[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1)


def dpo(model, folder, reference=None, **more):
    from trl import DPOConfig

    return watched(
        model=model,
        ref_model=reference,
        args=DPOConfig(**options(folder, learning_rate=0.02, max_length=16, beta=0.5, **more)),
        train_dataset=pairs(),
        processing_class=tokenizer(),
    )


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every weight: no memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@pytest.mark.parametrize("moment", ["before adapting", "after adapting"])
def test_dpo_against_a_twin_that_shares_the_base(tmp_path, moment):
    model, plain = built("llama"), built("llama")
    reference = twin(model) if moment == "before adapting" else None
    adapter = fs.adapt(model, fs.LSR(rank=4, separation_rank=3), "all-linear")
    if reference is None:
        reference = twin(model)
        fs.activate(reference, None)
    weight = "model.layers.0.self_attn.q_proj.weight"
    shared = reference.get_parameter(weight)
    assert shared.data_ptr() == model.get_parameter(weight).data_ptr()
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    trainer = dpo(model, tmp_path, reference)
    trainer.train()
    margins = [e["rewards/margins"] for e in trainer.state.log_history if "rewards/margins" in e]
    batch = trainer.batches[0]
    both = log_probabilities(plain, batch)
    torch.testing.assert_close(log_probabilities(reference.eval(), batch), both)
    with adapter.disabled():
        torch.testing.assert_close(log_probabilities(model.eval(), batch), both)
    assert (log_probabilities(model, batch) - both).abs().min() > 1e-3
    assert margins[-1] > margins[0]


def test_dpo_with_log_probabilities_taken_before_training(tmp_path):
    model, plain = built("llama"), built("llama")
    adapter = fs.adapt(model, fs.LSR(rank=4, separation_rank=3), "all-linear")
    trainer = dpo(model, tmp_path, precompute_ref_log_probs=True)
    trainer.train()
    assert trainer.ref_model is None
    assert trainer.asked == 2
    for batch in trainer.batches:
        wanted = log_probabilities(plain, batch)
        kept = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        torch.testing.assert_close(kept, wanted, atol=1e-4, rtol=1e-5)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert (log_probabilities(model.eval(), batch) - wanted).abs().min() > 1e-3
    assert adapter.name in fs.hosts.adapter_set_of(adapter.model).attached


def test_a_head_that_trl_reads_past_is_named_by_the_driver(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = built("llama")
    adapter = fs.adapt(model, fs.LSR(rank=4, separation_rank=3), ["q_proj", "lm_head"])
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
    Driver(model, "default", optimizer, max_grad_norm=0.0)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options(tmp_path, max_length=16)),
        train_dataset=Dataset.from_list([{"input_ids": [4, 5, 6, 7]}] * 2),
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
    )
    with pytest.raises(TrainingError, match=r"1 of 4 layers never ran.*: lm_head;"):
        trainer.train()


@pytest.mark.parametrize("how", ["adapted", "trained whole"])
def test_a_head_that_trl_reads_past_is_warned_of_without_a_driver(tmp_path, how):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = built("llama")
    if how == "adapted":
        fs.adapt(model, fs.LSR(rank=4, separation_rank=3), ["q_proj", "lm_head"])
    else:
        fs.adapt(model, fs.LSR(rank=4, separation_rank=3), ["q_proj"], train_modules=["lm_head"])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options(tmp_path, max_length=16)),
        train_dataset=Dataset.from_list([{"input_ids": [4, 5, 6, 7]}] * 2),
        processing_class=tokenizer(),
    )
    with pytest.warns(UserWarning, match="'default' acts at 'lm_head', which this model did not"):
        trainer.train()
