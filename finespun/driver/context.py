"""What a hook is handed: `contract.StepContext` for one owner."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finespun.contract import AdapterView, MicroBatch, Need
from finespun.contract.training import Heads
from finespun.driver.slots import OwnSlots
from finespun.driver.teacher import snapshot, teaching
from finespun.errors import InputError

if TYPE_CHECKING:
    from finespun.driver.driver import Driver


class Context:
    """One owner's window on a run; always the driver's present step and micro-batch."""

    def __init__(self, driver: Driver, slots: OwnSlots, seed: int) -> None:
        self.driver, self.slots, self.seed = driver, slots, seed

    @property
    def model(self) -> nn.Module:
        return self.driver.model

    @property
    def adapter(self) -> AdapterView:
        return self.driver.view

    @property
    def optimizer(self) -> Optimizer:
        return self.driver.optimizer

    @property
    def step(self) -> int:
        return self.driver.step

    @property
    def micro(self) -> int:
        return self.driver.micro.index

    def generator(self, *purpose: str | int) -> torch.Generator:
        """A CPU generator fixed by (seed, owner, purpose)."""
        text = "\0".join(map(str, (self.seed, self.slots.owner, *purpose)))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def lr(self, parameter: nn.Parameter) -> float:
        """The learning rate of a parameter in this step. Raises InputError for one that the
        optimiser does not train."""
        for group in self.optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                return float(group["lr"])
        raise InputError(
            f"the optimiser does not train this parameter of {tuple(parameter.shape)}: return it "
            "from TrainingHooks.parameters and make the optimiser after prepare()"
        )

    def call(self, batch: Any) -> Any:
        """The model's outputs for a batch as hooks are given it."""
        with self.driver.quiet():
            if isinstance(batch, Mapping):
                return self.model(**batch)
            return self.model(*batch) if isinstance(batch, tuple) else self.model(batch)

    def teacher(self, batch: Any, heads: Heads = "own") -> Any:
        """The outputs of the model without its deltas; see `StepContext.teacher`."""
        self.slots.require(Need.TEACHER)
        with teaching(self.driver.view, heads):
            return self.call(batch)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the trained modules' tensors, by MODULE/NAME."""
        return snapshot(self.driver.view)

    def replay(self) -> Iterator[MicroBatch]:
        """The step's micro-batches once more, each under the random state that it ran with; what
        is random is afterwards as it was."""
        self.slots.require(Need.REPLAY)
        return self.driver.micro.replay(self.model)
