"""Which layers are adapted, and how much in each: choices that are made during training."""

from finespun.allocation.allocation import ALLOCATIONS, Allocation, register
from finespun.allocation.lor2c import MergeInject, inject, merge

__all__ = ["ALLOCATIONS", "Allocation", "MergeInject", "inject", "merge", "register"]
