"""Which layers are adapted, and how much in each: choices that are made during training."""

from finespun.contract.allocation import ALLOCATIONS
from finespun.methods.allocation.merge_inject import MergeInject, inject, merge

__all__ = ["ALLOCATIONS", "MergeInject", "inject", "merge"]
