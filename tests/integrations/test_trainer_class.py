"""`fs.integrations.trainer_class`: what is trained, clipped, saved, resumed, pushed and refused."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import sampled
from tiny import built
from torch import nn

import finespun as fs
from finespun.errors import FinespunError, InputError, TrainingError
from finespun.integrations import trainer_class

pytestmark = pytest.mark.slow

ROWS = [
    {k: [4 + (i + j) % 30 for j in range(8)] for k in ("input_ids", "labels")} for i in range(8)
]
BASE_FILES = {"model.safetensors", "pytorch_model.bin", "config.json"}


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 3e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        **more,
    }


def made(folder: Path, model: Any = None, above: type | None = None, **more: Any) -> Any:
    """A trainer of a tiny Llama with an adapter; arguments of the class are told by their names."""
    from transformers import Trainer, TrainingArguments

    own = {k: more.pop(k) for k in ("hooks", "callbacks", "optimizers", "adapter") if k in more}
    if model is None:
        model = built("llama")
        fs.adapt(model, fs.LSR(rank=4, separation_rank=3), "all-linear")
    return trainer_class(above or Trainer)(
        model,
        TrainingArguments(**options(folder, **more)),
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        **own,
    )


def values(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer._adapter.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def killed_in(step: int, folder: Path, **more: Any) -> None:
    """Train in a child process, which is killed when that step has ended and been saved or not."""
    from transformers import TrainerCallback

    class Killed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        made(folder, callbacks=[Killed()], **more).train()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("step", [3, 4])
def test_a_killed_run_resumes_bit_equal(step, tmp_path):
    whole = made(tmp_path / "whole")
    whole.train()
    killed_in(step, tmp_path / "killed")
    again = made(tmp_path / "killed")
    start = values(again)
    again.train(resume_from_checkpoint=True)
    assert again._driver.step == whole._driver.step == 6
    assert same(values(again), values(whole))
    assert not same(start, values(whole))
    for checkpoint in (tmp_path / "killed").glob("checkpoint-*"):
        held = {p.name for p in checkpoint.iterdir()}
        assert {"adapter.json", "adapter.safetensors", "trainer_state.json"} <= held
        assert not held & BASE_FILES
    plain = built("llama")
    fs.load(plain, tmp_path / "killed" / "checkpoint-6")
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, whole.model.eval()(ids).logits)


AXES = ("GGPO", "MGPO", "ALLoRA", "LoRAPlus", "LoRAPro", "Muon")


@pytest.mark.parametrize("name", sampled(AXES, 0.0, 0.5))
def test_values_of_the_axes_resume_bit_equal(name, tmp_path):
    def run(**more: Any) -> Any:
        model = built("llama")
        fs.adapt(model, fs.LoRA(rank=4), "all-linear")
        trainer = made(tmp_path, model, hooks=[getattr(fs, name)()], learning_rate=5e-3)
        trainer.train(**more)
        return trainer

    whole = run()
    again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again._driver.step == 6
    assert same(values(again), values(whole))


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    whole = made(tmp_path)
    whole.train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    again = made(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert same(values(again), values(whole))
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        made(tmp_path / "empty").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("limit", [0.0, 1e-2, 1e9])
def test_clipping_is_trainers_own(limit, tmp_path):
    from transformers import Trainer, TrainingArguments

    ours = made(tmp_path / "a", max_grad_norm=limit, max_steps=3, optim="sgd", save_strategy="no")
    ours.train()
    model = built("llama")
    adapter = fs.adapt(model, fs.LSR(rank=4, separation_rank=3), "all-linear")
    args = options(tmp_path / "b", max_grad_norm=limit, max_steps=3, optim="sgd")
    Trainer(model, TrainingArguments(**args | {"save_strategy": "no"}), train_dataset=ROWS).train()
    for a, b in zip(ours._adapter.parameters(), adapter.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    told = torch.load(_arguments(ours, tmp_path / "saved"), weights_only=False)
    assert told.max_grad_norm == limit


def _arguments(trainer: Any, folder: Path) -> Path:
    trainer.save_model(str(folder))
    return folder / "training_args.bin"


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = made(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", learning_rate=3.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    plain = built("llama")
    fs.load(plain, best)
    assert same(list(fs.Adapter(plain, "default").parameters()), values(trainer))
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, tmp_path):
    plain = made(tmp_path / "a", save_strategy="no", max_steps=3)
    plain.train()
    saving = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    other = made(
        tmp_path / "b", save_strategy="no", max_steps=3, gradient_checkpointing=True, **saving
    )
    other.train()
    for a, b in zip(values(plain), values(other)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_only_the_adapter_is_pushed(tmp_path, monkeypatch):
    from transformers import trainer as module

    pushed: list[set[str]] = []

    class Hub:
        def upload_folder(self, folder_path, **rest):
            pushed.append({p.name for p in Path(folder_path).iterdir() if p.is_file()})

    trainer = made(tmp_path)
    trainer.train()
    monkeypatch.setattr(module, "hf_api", Hub)
    trainer.hub_model_id = "somebody/adapter"
    trainer.push_to_hub()
    assert pushed
    assert {"adapter.json", "adapter.safetensors", "README.md"} <= pushed[-1]
    assert not pushed[-1] & BASE_FILES


def early(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    fs.adapt(model, fs.LoRA(rank=2), ["q_proj"])
    return {"optimizers": (optimizer, None)}


def frozen(model: nn.Module) -> dict[str, Any]:
    adapter = fs.adapt(model, fs.LoRA(rank=2), ["q_proj"])
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    return {}


REFUSED = {
    "no adapter": (lambda m: {}, "has no adapter: call fs.adapt"),
    "an optimiser of before": (early, "was it made before the adapter"),
    "an adapter that is frozen": (frozen, "can be trained"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_train_nothing_is_refused(kind, tmp_path):
    prepare, told = REFUSED[kind]
    model = built("llama")
    more = prepare(model)
    with pytest.raises(InputError, match=told):
        made(tmp_path, model, **more).train()


def test_layers_that_never_ran_are_named_before_torchs_own_error(tmp_path):
    class Beside(nn.Module):
        """Adapted where it is not called: the loss depends on nothing that is trained."""

        def __init__(self) -> None:
            super().__init__()
            self.called, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x, labels=None):
            out = self.called(x)
            return {"loss": out.square().mean(), "logits": out}

    model = Beside()
    fs.adapt(model, fs.LoRA(rank=2), ["idle"])
    trainer = made(tmp_path, model)
    trainer.train_dataset = [{"x": torch.ones(4), "labels": 0}] * 4
    with (
        pytest.warns(UserWarning, match="'idle', which this model did not call"),
        pytest.raises(TrainingError, match="1 of 1 layers never ran before the first step: idle"),
    ):
        trainer.train()


def test_peft_config_beside_the_adapter_is_refused(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
    from trl_words import tokenizer

    model = built("llama")
    fs.adapt(model, fs.LSR(rank=4, separation_rank=3), "all-linear")
    told = options(tmp_path, bf16=False, max_length=16, gradient_checkpointing=False)
    common = {
        "model": model,
        "args": SFTConfig(**told),
        "train_dataset": Dataset.from_list([{"input_ids": r["input_ids"]} for r in ROWS]),
        "processing_class": tokenizer(),
    }
    with pytest.raises(InputError, match="peft_config would freeze the adapter"):
        trainer_class(SFTTrainer)(**common, peft_config=LoraConfig(r=2))
    assert all(p.requires_grad for p in fs.Adapter(model, "default").parameters())
    trainer = trainer_class(SFTTrainer)(**common)
    trainer.train()
    assert (tmp_path / "checkpoint-6" / "adapter.json").is_file()
    SFTTrainer(**common, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="can be trained"):
        trainer_class(SFTTrainer)(**common)


def test_a_quantised_base_is_trained_and_only_its_adapter_saved(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import LlamaForCausalLM, TorchAoConfig, Trainer, TrainingArguments

    built("llama").save_pretrained(tmp_path / "base")
    told = TorchAoConfig(Int8WeightOnlyConfig())
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=told)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(**options(tmp_path / "run")), train_dataset=ROWS)
    fs.adapt(model, fs.LSR(rank=4, separation_rank=3), "attention")
    trainer = made(tmp_path / "run", model)
    start = values(trainer)
    trainer.train()
    assert not same(start, values(trainer))
    assert not model._hf_peft_config_loaded
    held = {p.name for p in (tmp_path / "run" / "checkpoint-6").iterdir()}
    assert "adapter.safetensors" in held
    assert not held & BASE_FILES


@pytest.mark.parametrize("what", [nn.Linear, dict])
def test_a_class_that_is_no_trainer_is_refused(what):
    with pytest.raises(FinespunError, match="is no trainer"):
        trainer_class(what)
