"""The axis of methods that decide during training which layers get how much."""

from dataclasses import dataclass

from finespun.contract.axis import AxisValue
from finespun.contract.method import REGISTRY
from finespun.contract.method import register as register


@dataclass(frozen=True, kw_only=True)
class Allocation(AxisValue):
    """Which layers are adapted, and how much in each: chosen before or during training."""

    axis = "allocation"


ALLOCATIONS: dict[str, type[Allocation]] = REGISTRY.setdefault("allocation", {})
