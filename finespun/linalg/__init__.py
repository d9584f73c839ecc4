"""Linear algebra of adapters: low-rank and Kronecker forms, and portable random streams."""

from . import streams
from .kronecker import (
    KronShape,
    KronShape3,
    choose_factors,
    choose_factors3,
    condition,
    nearest_kronecker_sum,
    rebalance,
)
from .lowrank import SVD, LowRank
from .rsvd import randomized_svd, randomized_svd_of

__all__ = [
    "SVD",
    "KronShape",
    "KronShape3",
    "LowRank",
    "choose_factors",
    "choose_factors3",
    "condition",
    "nearest_kronecker_sum",
    "randomized_svd",
    "randomized_svd_of",
    "rebalance",
    "streams",
]
