"""Which layers are adapted, and how much in each: choices that are made during training."""

from finespun.allocation.lor2c import MergeInject, inject, merge

__all__ = ["MergeInject", "inject", "merge"]
