"""Base models by name or folder. What needs transformers is found on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from finespun.models.loaded import Loaded

if TYPE_CHECKING:
    from finespun.models.causal import load_causal
    from finespun.models.classifier import MeanPooledClassifier, load_classifier
    from finespun.models.zoo import ZOO, find_model

PLACES = {
    "ZOO": "zoo",
    "MeanPooledClassifier": "classifier",
    "find_model": "zoo",
    "load_causal": "causal",
    "load_classifier": "classifier",
}

__all__ = ["ZOO", "Loaded", "MeanPooledClassifier", "find_model", "load_causal", "load_classifier"]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)
