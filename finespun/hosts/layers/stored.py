"""A layer's weight and bias as they lie in memory, and as they were before any merge."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finespun.contract import SiteShape
from finespun.errors import StateError
from finespun.hosts.adapter_set import AdapterSet, Kept, Patch
from finespun.kernels.entries import entries_of, write_entries

Stored = tuple[Tensor, Tensor | None]


class StoredLayer:
    """One module under its name, and how its parameters are read, written and put back.

    `writable` says that what `read` returns is a view of the stored parameters.
    """

    writable: ClassVar[bool] = True
    layer: Any

    def __init__(self, layer: nn.Module, name: str, adapter_set: AdapterSet) -> None:
        self.layer, self.name, self.adapter_set = layer, name, adapter_set

    @property
    def shape(self) -> SiteShape:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        if self._offloaded():
            return torch.device(self.layer._hf_hook.execution_device)
        return self.layer.weight.device

    def _offloaded(self) -> bool:
        """Whether accelerate has taken the weight away until the layer runs."""
        return "_hf_hook" in self.layer.__dict__ and self.layer.weight.is_meta

    def stored(self) -> Stored:
        """The layer's present weight and bias as they lie in memory, to be kept by pointer. Raises
        StateError where they are offloaded."""
        if self._offloaded():
            raise StateError(
                f"{self.name!r} is offloaded: its weight cannot be read or merged. Use a structure "
                "with factors, such as lora or lsr, or load the model without offloading"
            )
        bias = getattr(self.layer, "bias", None)
        return self.layer.weight.data, bias.data if isinstance(bias, Tensor) else None

    def restore(self, stored: Stored) -> None:
        """Put `stored` back, the very tensors."""
        self.layer.weight.data = stored[0]
        if stored[1] is not None:
            self.layer.bias.data = stored[1]

    def read(self, stored: Stored) -> Tensor:
        """What is stored, as a weight (out, in)."""
        return stored[0]

    def read_bias(self, stored: Stored) -> Tensor | None:
        """What is stored, as a bias (out,)."""
        return stored[1]

    def exchange(self, kept: Kept) -> Kept:
        """`put_back`; returns what stood there, to be put back in turn."""
        stored = self.stored()
        found: Kept = stored
        if isinstance(kept, Patch):
            W = self.read(stored)
            found = Patch(kept.index, entries_of(W, kept.index), kept.values.to(W.dtype))
        self.put_back(kept)
        return found

    def put_back(self, kept: Kept) -> None:
        """Put back what was kept: the very tensors, or single entries of the weight."""
        if isinstance(kept, Patch):
            write_entries(self.read(self.stored()), kept.index, kept.values)
        else:
            self.restore(kept)

    def let_edit(self) -> None:
        """From now on the entries that a merge wrote may be changed."""
        kept = self._kept()
        if isinstance(kept, Patch) and self.adapter_set.kept is not None:
            self.adapter_set.kept[self.name] = dataclasses.replace(kept, written=None)

    def _kept(self) -> Kept | None:
        """What a merge kept of this layer."""
        if self.adapter_set.for_good:
            raise StateError(f"{self.name!r} was merged with undo='none': its base weight is gone")
        return (self.adapter_set.kept or {}).get(self.name)

    def _original(self) -> Stored:
        """What was stored before any merge, single entries of the weight apart."""
        kept = self._kept()
        return self.stored() if kept is None or isinstance(kept, Patch) else kept

    def weight(self) -> Tensor:
        """W0 (out, in), whatever is merged."""
        W, kept = self.read(self._original()), self._kept()
        if isinstance(kept, Patch):
            write_entries(W := W.clone(), kept.index, kept.values)
        return W

    def bias(self) -> Tensor | None:
        """b0 (out,), whatever is merged."""
        return self.read_bias(self._original())

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        """Make W (out, in) and, where given, bias (out,) the layer's own."""
        raise NotImplementedError
