"""Finespun: adapt pretrained models with very few trained numbers."""

from finespun.adapter import Adapter, adapt, load
from finespun.convert import convert
from finespun.errors import FinespunError
from finespun.hosts import activate, disabled, evict, rows
from finespun.structures import LSR, STRUCTURES, LoRA, Structure, structure

__version__ = "0.1.0.dev0"
__all__ = [
    "LSR",
    "STRUCTURES",
    "Adapter",
    "FinespunError",
    "LoRA",
    "Structure",
    "activate",
    "adapt",
    "convert",
    "disabled",
    "evict",
    "load",
    "rows",
    "structure",
]
