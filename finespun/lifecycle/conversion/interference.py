"""How far two updates of one weight stand in each other's way when both are added."""

from typing import NamedTuple

import torch

from finespun.contract.delta import Delta
from finespun.errors import InputError
from finespun.kernels.entries import Entries


class Interference(NamedTuple):
    """`magnitude` ‖S1ᵀ S2‖_F (AWOM) and `apart` 1 − ‖S1ᵀ S2‖₀ / in² (AWOR): 1 where the two move no
    output in common, 0 where every input of one meets every input of the other."""

    magnitude: float
    apart: float


@torch.no_grad()
def interference(one: Delta, two: Delta) -> Interference:
    """Of two updates S1, S2 (out, in); in the time of their entries where both have few. Raises
    InputError unless they have one shape. Source: arXiv 2406.13175."""
    shapes = [(d.site.shape.out_features, d.site.shape.in_features) for d in (one, two)]
    if shapes[0] != shapes[1]:
        raise InputError(f"updates of {shapes[0]} and {shapes[1]} are not of one weight")
    first, second = one.sparse(), two.sparse()
    if first is None or second is None:
        values = one.dense(one.base_weight()).T @ two.dense(two.base_weight())
    else:
        S1, S2 = (Entries(index, shapes[0]) for index, _ in (first, second))
        values = (S1.transposed(first[1]) @ S2.matrix(second[1])).values()
    meets = int(values.count_nonzero())
    return Interference(float(values.norm()), 1 - meets / shapes[0][1] ** 2)
