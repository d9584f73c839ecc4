"""Trainers of transformers, TRL and sentence-transformers, made to train an adapter."""

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finespun.adapter import Adapter
from finespun.contract import AxisValue, TrainingHooks
from finespun.driver import Driver, prepare
from finespun.errors import InputError
from finespun.integrations import checkpoints
from finespun.integrations.finding import in_training

STATE_FILE, ARGUMENTS = "trainer_state.json", "training_args.bin"
FILES = ("adapter.json", "adapter.safetensors")


@functools.cache
def trainer_class(base: type) -> Any:
    """The class `base` (Trainer, SFTTrainer, SentenceTransformerTrainer, ...) for adapted models.

    It takes the same arguments and, beside them, `hooks` (values of the axes) and `adapter` (where
    several can be trained). The adapter alone is trained, clipped to args.max_grad_norm by a
    `Driver`, saved, pushed and put back, also where the base is quantised. Raises InputError for a
    class that is no Trainer.
    """
    needed = ("create_optimizer", "compute_loss", "_save", "_load_from_checkpoint")
    if not all(callable(getattr(base, name, None)) for name in needed):
        raise InputError(
            f"{base.__name__} is no trainer of transformers, TRL or sentence-transformers; pass "
            "the class, such as transformers.Trainer"
        )
    return type(f"{base.__name__}ForAdapters", (AdapterTraining, base), {"__doc__": base.__doc__})


class AdapterTraining:
    """What is laid over a Trainer: in its place in front of the class, `super()` is the Trainer."""

    if TYPE_CHECKING:
        args: Any
        optimizer: Any

        def __getattr__(self, name: str) -> Any:
            """What the Trainer has."""

    @property
    def _above(self) -> Any:
        return super()

    def __init__(
        self,
        *args: Any,
        hooks: Sequence[AxisValue | TrainingHooks] = (),
        adapter: Adapter | None = None,
        **options: Any,
    ) -> None:
        given = inspect.signature(self._above.__init__).bind(*args, **options).arguments
        given |= given.get("kwargs", {})
        _check(given)
        model = given.get("model")
        self._hooks = tuple(hooks)
        self._driver: Any = None
        if model is not None:
            self._adapter = adapter or in_training(model)
        with _trainable_though_quantised(model):
            self._above.__init__(*args, **options)
        if model is None:
            self._adapter = adapter or in_training(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "FSDP and DeepSpeed shard what a checkpoint would hold: use "
                "DistributedDataParallel (torchrun without them), or a loop of your own"
            )
        self._limit = self.args.max_grad_norm
        self.args = copy.copy(self.args)
        self.args.max_grad_norm = 0.0  # the driver clips, after all hooks

    # --- training -------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Trainer's own; `resume_from_checkpoint=True` takes the last checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(_last_whole(self.args.output_dir))
        finished = False
        try:
            done = self._above.train(resume_from_checkpoint=resume_from_checkpoint, **options)
            finished = True
        finally:
            if self._driver is not None:
                self._driver.close(finished)
        return done

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Trainer's own, watched by a driver; with hooks, in the groups that they ask for."""
        if self._driver is not None:
            self._driver.close(finished=False)
        if self.model_init is not None:
            self._adapter = in_training(self.model)
        adapter, made = self._adapter, self.args
        _reach(self.model, made)
        steps = self.state.max_steps or (made.max_steps if made.max_steps > 0 else None)
        prepared = prepare(adapter.model, adapter.name, self._hooks, steps, made.seed)
        if self.optimizer is None and self._hooks:
            self.optimizer = self._grouped(prepared)
        self._above.create_optimizer(*args, **options)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        self._driver = Driver(
            adapter.model, adapter.name, inner, self._limit, prepared, own_loss=True
        )
        return self.optimizer

    def _grouped(self, prepared: Any) -> Any:
        made = self.args
        if prepared.stepper is not None:
            return prepared.optimizer(made.learning_rate, made.weight_decay)
        kind, options = self.get_optimizer_cls_and_kwargs(made, self.model)
        own = {"params", "model", "optimizer_dict"} & options.keys()
        if own:
            raise InputError(
                f"optim={str(made.optim)!r} chooses its own parameters, and hooks do too: take an "
                "optim such as 'adamw_torch', or no hooks"
            )
        return kind(prepared.groups(made.learning_rate, made.weight_decay), **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Trainer's own with the extra losses of the hooks. Raises TrainingError naming the layers
        that never ran, where the loss depends on nothing that is trained."""
        driver = self._driver
        training = model.training and torch.is_grad_enabled() and driver is not None and driver.open
        extra = training and driver.losses
        found = self._above.compute_loss(
            model,
            inputs,
            return_outputs=return_outputs or bool(extra),
            num_items_in_batch=num_items_in_batch,
        )
        if not training:
            return found
        loss, outputs = found if return_outputs or extra else (found, None)
        if extra:
            loss = loss + driver.loss(inputs, outputs, num_items_in_batch)
        if not loss.requires_grad:
            driver.first.check()
        return (loss, outputs) if return_outputs else loss

    # --- files ----------------------------------------------------------------------------------
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter, the tokenizer and the arguments, instead of the whole model."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._adapter.save(folder)
        words: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if hasattr(words, "save_pretrained"):
            words.save_pretrained(folder)
        said = copy.copy(self.args)
        said.max_grad_norm = self._limit
        torch.save(said, folder / ARGUMENTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._above._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            checkpoints.write_state(output_dir, self._adapter, self._driver)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.read(resume_from_checkpoint, self._adapter)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._above._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._driver is not None:
            checkpoints.read_driver(checkpoint, self._driver)

    def _load_best_model(self) -> None:
        if self._driver is not None:
            self._driver.end()
        checkpoints.read(self.state.best_model_checkpoint, self._adapter)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self._adapter.save(self.args.output_dir)
        self._above._push_from_checkpoint(checkpoint_folder)


def _check(given: dict[str, Any]) -> None:
    """Raise InputError for what would train something else than the adapter."""
    if given.get("peft_config") is not None:
        raise InputError(
            "peft_config would freeze the adapter that the model has and train one of PEFT's: "
            "leave it out, or pass a model without a Finespun adapter to TRL's own class"
        )
    model = given.get("model")
    if model is None and given.get("model_init") is None:
        raise InputError("model=None: pass the model that fs.adapt was given")
    if model is not None and not isinstance(model, nn.Module):
        raise InputError(
            f"model={model!r} is a name: load the model, call fs.adapt on it, and pass it"
        )


@contextmanager
def _trainable_though_quantised(model: Any) -> Iterator[None]:
    """Trainer refuses a quantised base unless it believes that PEFT holds it; so does the adapter,
    which computes in float32."""
    said = isinstance(model, nn.Module) and getattr(model, "is_quantized", False)
    if said:
        model.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        if said:
            model.__dict__.pop("_hf_peft_config_loaded", None)


def _reach(model: Any, args: Any) -> None:
    """Reentrant checkpointing passes a gradient on only from inputs that ask for one."""
    # transformers 5.23 calls activation_checkpointing what was gradient_checkpointing
    word = "activation" if hasattr(args, "activation_checkpointing") else "gradient"
    wanted = getattr(args, f"{word}_checkpointing", False)
    options = getattr(args, f"{word}_checkpointing_kwargs", None) or {}
    if wanted and options.get("use_reentrant") and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()


def _last_whole(folder: str | Path) -> Path:
    """The last checkpoint whose last file was written. Raises InputError where there is none."""
    root = Path(folder)
    found = {
        int(p.name.removeprefix("checkpoint-")): p
        for p in (root.glob("checkpoint-*") if root.is_dir() else ())
        if p.name.removeprefix("checkpoint-").isdigit() and (p / STATE_FILE).is_file()
    }
    if not found:
        raise InputError(f"{root} holds no whole checkpoint-N: leave resume_from_checkpoint out")
    return found[max(found)]
