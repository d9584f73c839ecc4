"""The training loop: plain PyTorch, one optimiser, and a state that can be taken up again exactly.

Everything that moves during a run (step, place in the data, parameters, optimiser, driver, random
state, losses) is in `Loop.state_dict`; what a step does is a function of it and of the recipe.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import FrameType
from typing import Any

import torch

from finespun.adapter import Adapter
from finespun.adapters.keys import parsed, spelt
from finespun.contract import AxisValue, Measured, ParamGroup, TrainingHooks
from finespun.driver import Driver, prepare, set_lr
from finespun.errors import StateError, TrainingError
from finespun.recipes.training import Training
from finespun.tasks.batches import Batches, Position
from finespun.tasks.task import Batch
from finespun.training.checkpoint import random_state, set_random_state
from finespun.training.progress import Reporter

Save = Callable[[dict[str, Any]], None]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during training: the step was finished and, where there is a folder, a
    checkpoint written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step = step


class Loop:
    """Trains `adapter` on `batches` as `training` says, with AdamW or the stepper among `hooks`,
    and the peak learning rates `lr` of updates and `head_lr` of modules that are trained whole
    beside them (None: the same).

    A step is made of `training.accumulate` batches; their losses are weighted by the task, so that
    the gradient is that of one batch with all of them. `save` is handed the state at every
    checkpoint.
    """

    def __init__(
        self,
        adapter: Adapter,
        batches: Batches,
        training: Training,
        lr: float,
        reporter: Reporter | None = None,
        save: Save | None = None,
        hooks: Sequence[AxisValue | TrainingHooks] = (),
        head_lr: float | None = None,
        measured: Measured | None = None,
    ) -> None:
        self.adapter, self.batches, self.training, self.lr = adapter, batches, training, lr
        self.reporter, self.save = reporter or Reporter(), save
        prepared = prepare(adapter.model, adapter.name, hooks, self.steps, training.seed, measured)
        heads = [p for module in adapter.attached.copies.values() for p in module.parameters()]
        if head_lr is not None and 0 < len(heads) < len(adapter.parameters()):
            prepared.wishes.append(ParamGroup(heads, head_lr / lr))
        self.optimizer = prepared.optimizer(lr, training.weight_decay)
        self.driver = Driver(
            adapter.model, adapter.name, self.optimizer, training.max_grad_norm, prepared
        )
        self.device = next(adapter.model.parameters()).device
        self.losses: list[float] = []
        self.seconds = 0.0
        self.saved = -1

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return len(self.losses)

    @property
    def steps_per_epoch(self) -> int:
        return self.steps // self.training.epochs

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return steps_of(len(self.batches), self.training)

    def run(self) -> None:
        """Train from where the state stands to the end, once.

        Raises TrainingError when a loss or gradient is not finite (the last checkpoint stays),
        Interrupted after Ctrl-C or SIGTERM, and StateError where it was run before.
        """
        if not self.driver.open:
            raise StateError("this loop has run: make another one, and load_state_dict to go on")
        self.reporter.tell({"event": "start", "steps": self.steps, "done": self.step})
        for text in () if self.step else self.driver.news():
            self.reporter.tell({"event": "note", "text": text})
        every = self.training.checkpoint_every or self.steps_per_epoch
        patience = 60 * (self.training.checkpoint_minutes or math.inf)
        looked = time.monotonic()
        with self.driver, train_mode(self.adapter), caught_interrupt() as interrupted:
            while self.batches.position.epoch < self.training.epochs:
                stream = self.batches.epoch()
                while group := list(islice(stream, self.training.accumulate)):
                    self.take(group)
                    old = time.monotonic() - looked >= patience
                    if self.step % every == 0 or old or interrupted.is_set():
                        self.checkpoint()
                        looked = time.monotonic()
                    if interrupted.is_set():
                        raise Interrupted(self.step)
            self.checkpoint()
        self.reporter.tell({"event": "end", "step": self.step, "seconds": self.seconds})

    def take(self, group: list[Batch]) -> None:
        """One optimiser step over all rows of `group`."""
        started = time.perf_counter()
        lr = self.lr * lr_factor(self.step, self.steps, self.training)
        set_lr(self.optimizer, lr)
        task = self.batches.task
        rows, weights = sum(map(task.count, group)), [task.weight(batch) for batch in group]
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i, (batch, weight) in enumerate(zip(group, weights)):
            moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
            self.driver.micro_batch(first=i == 0, share=weight / sum(weights))
            loss = task.loss(self.adapter.model, moved) * (weight / sum(weights))
            loss.backward()
            total += loss.detach()
        value = float(total)
        self._check(value, "loss", self.step + 1)
        self.optimizer.step()
        self._check(self.driver.grad_norm, "gradient norm", self.step + 1)
        self.losses.append(value)
        for text in self.driver.news():
            self.reporter.tell({"event": "note", "text": text})
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.reporter.tell(
            {
                "event": "step",
                "step": self.step,
                "epoch": round(self.step / self.steps_per_epoch, 4),
                "loss": value,
                "lr": lr,
                "grad_norm": self.driver.grad_norm,
                "examples_per_second": round(rows / seconds, 1),
            }
        )

    def _check(self, value: float, what: str, step: int) -> None:
        if math.isfinite(value):
            return
        lr = self.optimizer.param_groups[0]["lr"]
        kept = f"the checkpoint of step {self.saved} is kept" if self.saved >= 0 else ""
        raise TrainingError(
            f"the {what} is {value} in step {step} of {self.steps} at learning rate {lr:.3g}; "
            f"try training.lr={self.lr / 3:.1g} or a longer training.warmup_share"
            + (f" ({kept})" if kept else "")
        )

    def checkpoint(self) -> None:
        """Hand the state to `save`, once for each step, and report the updates' health. Raises
        TrainingError instead where a trained parameter is not finite."""
        if self.saved == self.step:
            return
        for parameter in filter(torch.Tensor.numel, self.adapter.parameters()):
            self._check(float(parameter.detach().abs().max()), "largest number", self.step)
        health = {name: delta.diagnostics() for name, delta in self.adapter.deltas.items()}
        self.reporter.tell(
            {
                "event": "checkpoint",
                "step": self.step,
                "diagnostics": {name: numbers for name, numbers in health.items() if numbers},
            }
        )
        if self.save is not None:
            self.save(self.state_dict())
        self.saved = self.step

    # --- state -----------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, in the form that a checkpoint takes."""
        position = self.batches.position
        return {
            "step": self.step,
            "epoch": position.epoch,
            "batch": position.batch,
            "seconds": self.seconds,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "adapter": spelt(self.adapter.attached.tensors()),
            "optimizer": self.optimizer.state_dict(),
            "driver": self.driver.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken. Raises InputError or StateError where it does not
        fit this adapter or this data."""
        live = self.adapter.attached
        live.load(parsed(state["adapter"], live.trained))
        self.optimizer.load_state_dict(state["optimizer"])
        self.driver.load_state_dict(state["driver"])
        self.batches.restore(Position(state["epoch"], state["batch"]))
        self.losses = [float(loss) for loss in state["losses"]]
        self.seconds, self.saved = state["seconds"], self.step
        set_random_state(state["random"])


def steps_of(batches: int, training: Training) -> int:
    """Optimiser steps of a run whose epochs have so many batches."""
    return -(-batches // training.accumulate) * training.epochs


def lr_factor(step: int, steps: int, training: Training) -> float:
    """The share of the peak learning rate in `step` (from 0): a linear rise over the warm-up, then
    constant, or falling towards 0 linearly or as half a cosine."""
    warmup = round(training.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    match training.schedule:
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "constant":
            return 1.0


@contextmanager
def train_mode(adapter: Adapter) -> Iterator[None]:
    """Training mode, dropout of the base included; frozen normalisation layers keep their running
    statistics. The modes of before come back at the end."""
    before = {module: module.training for module in adapter.model.modules()}
    adapter.model.train()
    mine = {id(p) for p in adapter.parameters()}
    for module in before:
        own = getattr(module, "track_running_stats", False)
        if own and not any(id(p) in mine for p in module.parameters(recurse=False)):
            module.training = False  # not eval(), which would reach an adapter's own copy too
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def caught_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one ends the run at once. Outside
    the main thread, where signals cannot be caught, the event is never set."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {
        signal.SIGINT: signal.getsignal(signal.SIGINT) or signal.default_int_handler,
        signal.SIGTERM: signal.getsignal(signal.SIGTERM) or signal.SIG_DFL,
    }

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        asked.set()
        put_back()

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        put_back()
