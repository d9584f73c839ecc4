"""A base model with what feeds it."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Loaded:
    """A loaded model with its tokenizer; `fresh` names the modules that start untrained."""

    name: str
    model: nn.Module
    tokenizer: Any
    fresh: tuple[str, ...]


def slices_logits(model: nn.Module) -> bool:
    """Whether the model computes logits for chosen positions only, if asked."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
