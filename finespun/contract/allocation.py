"""The axis of methods that decide during training which layers get how much."""

from dataclasses import dataclass
from typing import Any

from finespun.contract.method import Method, registering
from finespun.contract.structure import Structure
from finespun.contract.training import Moments


@dataclass(frozen=True, kw_only=True)
class Allocation(Method):
    """Hyper-parameters of one way to decide; subclass it beside its `Moments`."""

    def suits(self, structure: Structure) -> None:
        """Raise InputError where this is not for such a structure; any will do unless a method
        says otherwise."""

    def begin(self, entry: Any, steps: int) -> Moments:
        """What happens in one run of `steps` steps, for the driver. Raises InputError where the
        adapter cannot take it; nothing is changed yet."""
        raise NotImplementedError(f"{type(self).__name__} must say how a run begins")


ALLOCATIONS: dict[str, type[Allocation]] = {}
register = registering(ALLOCATIONS, "an allocation")
