"""Linear algebra of adapters: low-rank and Kronecker forms, and portable random streams."""

from . import streams
from .kronecker import (
    KronShape,
    KronShape3,
    choose_factors,
    choose_factors3,
    choose_sides,
    condition,
    nearest_kronecker_sum,
    rebalance,
)
from .lowrank import SVD, LowRank
from .rsvd import randomized_svd, randomized_svd_of
from .separable import Separable, nearest_separable, nearest_sides, predicted_error

__all__ = [
    "SVD",
    "KronShape",
    "KronShape3",
    "LowRank",
    "Separable",
    "choose_factors",
    "choose_factors3",
    "choose_sides",
    "condition",
    "nearest_kronecker_sum",
    "nearest_separable",
    "nearest_sides",
    "predicted_error",
    "randomized_svd",
    "randomized_svd_of",
    "rebalance",
    "streams",
]
