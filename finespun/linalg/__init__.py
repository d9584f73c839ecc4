"""Linear algebra of adapters: nearest Kronecker sums."""

from .kronecker import (
    KronShape,
    KronShape3,
    choose_factors,
    choose_factors3,
    condition,
    nearest_kronecker_sum,
    rebalance,
)

__all__ = [
    "KronShape",
    "KronShape3",
    "choose_factors",
    "choose_factors3",
    "condition",
    "nearest_kronecker_sum",
    "rebalance",
]
