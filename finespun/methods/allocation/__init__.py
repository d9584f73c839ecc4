"""Which layers are adapted, and how much in each: choices that are made during training."""

from finespun.methods.allocation.merge_inject import MergeInject, inject, merge

__all__ = ["MergeInject", "inject", "merge"]
