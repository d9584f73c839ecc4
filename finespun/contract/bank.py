"""Trained parameters that several deltas share, and the module that keeps their precision."""

import copy
from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from finespun.contract.site import Site
from finespun.errors import InputError


class Precise(nn.Module):
    """Follows the model to another device or a higher precision, never to a lower one."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype.itemsize >= tensor.dtype.itemsize:
                return moved
            return tensor.to(moved.device)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self


class Bank(Precise):
    """Trained parameters that several deltas share; owned by the adapter and saved once. They keep
    their precision as a delta's do."""

    @classmethod
    def at(cls, bank: "Bank | None", site: Site) -> Self:
        """The bank that a site's delta will read, moved to the site's device. Raises InputError
        where it is not of this class."""
        if not isinstance(bank, cls):
            raise InputError(
                f"{site.shape.name!r} shares trained parameters: build it with bank(plan), a "
                f"{cls.__name__}, not {bank!r}"
            )
        return bank.to(site.device)

    def keep_start(self) -> "Bank":
        """A frozen copy of today's parameters, made once, saved with the bank."""
        if "start" not in self._modules:
            self.start = copy.deepcopy(self).requires_grad_(False)
        return self._modules["start"]  # type: ignore[return-value]
