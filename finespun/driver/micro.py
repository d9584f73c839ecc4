"""Which micro-batch of a step is under way, its share of the loss, and how to run it again."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract import MicroBatch
from finespun.driver.teacher import same_random_state
from finespun.errors import TrainingError


@dataclass
class Kept:
    """A micro-batch as it ran: what the model was given, its share where known, random states."""

    batch: Any
    share: float | None
    random: tuple[Tensor, dict[int, Tensor]]


@dataclass
class Micro:
    """Counts the micro-batches of a step: those that a loop announces, else training passes.

    `begun` of them have started; `keeps` says that they are kept for a replay.
    """

    keeps: bool = False
    begun: int = 0
    announced: bool = False
    fresh: bool = True
    share: float | None = None
    kept: list[Kept] = field(default_factory=list)

    @property
    def index(self) -> int:
        """The micro-batch under way, from 0."""
        return max(self.begun - 1, 0)

    def announce(self, share: float | None) -> None:
        """A loop begins a micro-batch."""
        self.announced, self.fresh, self.share = True, True, share

    def restart(self) -> None:
        """The next pass is the first of a step."""
        self.begun, self.fresh = 0, True
        self.kept.clear()

    def begin(self) -> bool:
        """A training pass begins: whether it is the first of a micro-batch, which then counts."""
        new = self.fresh or not self.announced
        self.fresh = False
        self.begun += new
        return new

    def keep(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the pass that is about to run."""
        if self.keeps:
            share = share_of(model, kwargs) if "num_items_in_batch" in kwargs else self.share
            state = torch.get_rng_state(), _device_states(model)
            self.kept.append(Kept(kwargs or args, share, state))

    def replay(self, model: nn.Module) -> Iterator[MicroBatch]:
        """What was kept, under its random state; where shares are not known they are equal."""
        begun, kept = self.begun, list(self.kept)
        with same_random_state(model), self._at(begun):
            for self.begun, one in enumerate(kept, 1):
                torch.set_rng_state(one.random[0])
                for device, state in one.random[1].items():
                    torch.cuda.set_rng_state(state, device)
                share = 1 / len(kept) if one.share is None else one.share
                yield MicroBatch(one.batch, share)

    @contextmanager
    def _at(self, begun: int) -> Iterator[None]:
        """Afterwards so many micro-batches have begun."""
        try:
            yield
        finally:
            self.begun = begun


def share_of(model: nn.Module, kwargs: Mapping[str, Any]) -> float:
    """How much of a step's loss one forward pass is, by what it was given: 1.0, or the share of its
    labels in `num_items_in_batch`, by which transformers' models divide their summed loss.

    Raises TrainingError where that is given without labels.
    """
    items = kwargs.get("num_items_in_batch")
    if items is None:
        return 1.0
    labels = kwargs.get("shift_labels", kwargs.get("labels"))
    if isinstance(labels, Tensor) and "shift_labels" not in kwargs and _shifts(model):
        labels = labels[..., 1:]
    if not isinstance(labels, Tensor):
        raise TrainingError(
            "the model is given num_items_in_batch without labels: an extra loss cannot be weighted"
        )
    total = items.flatten()[0] if isinstance(items, Tensor) else items
    return float(labels.ne(-100).sum() / total)


def _shifts(model: nn.Module) -> bool:
    """Whether the model's loss leaves out the first label of a row, by transformers' own rule."""
    losses = sys.modules.get("transformers.loss.loss_utils")
    if losses is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    own = losses.LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return bool(own is losses.ForCausalLMLoss)


def _device_states(model: nn.Module) -> dict[int, Tensor]:
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    return {device: torch.cuda.get_rng_state(device) for device in devices}
