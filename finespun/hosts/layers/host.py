"""The adapted layer: a host's own module object with a subclass put in front of its class.

    y = base(x) + Σ c_i [ drop_i(x) (W_i − W0)ᵀ + (b_i − b0) ],   W_i = map_weight_i(W0)

always from the original W0. The layer knows no method by name: it picks the fused kernel where a
delta has factors, else `through`, else the dense form; with a hook on the delta, its `forward`.
"""

import copy
import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract import Coupling, Delta, SiteShape
from finespun.contract.delta import Factors
from finespun.errors import StateError
from finespun.hosts.adapter_set import AdapterSet, Kept, Patch, Rows
from finespun.hosts.layers.slotted import Base, Slotted
from finespun.hosts.slots import SiteSlots
from finespun.kernels.entries import entries_of, write_entries

Stored = tuple[Tensor, Tensor | None]
_GLOBAL = nn.modules.module


class Host(Slotted):
    """Where deltas attach at one module; the object beside the layer that speaks for it.

    A host is also the Site that its deltas see. Five verbs hide the kind of layer: `weight()` as
    (out, in), `multiply(x, W)`, `down(x, A)`, `up(h, B)` and `write(W)`. `slots` holds gains,
    overlays and mixers by adapter. `featured` says that the last dimension of x and y holds the
    features, `writable` that what `read` returns is a view of the stored numbers.
    """

    kind: ClassVar[str] = ""
    featured: ClassVar[bool] = True
    writable: ClassVar[bool] = True
    layer: Any
    coupling: Coupling | None = None

    def __init__(self, layer: nn.Module, name: str, adapter_set: AdapterSet) -> None:
        self.layer, self.name, self.adapter_set = layer, name, adapter_set
        self.ran, self.slots = False, SiteSlots()

    @property
    def shape(self) -> SiteShape:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> "Host":
        """A host goes with its layer: copied with the model, shared by a copy of a delta alone."""
        if id(self.layer) not in memo and id(self.adapter_set) not in memo:
            return self
        twin = memo[id(self)] = copy.copy(self)
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return twin

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
        if self.adapter_set.merged and self.adapter_set.kept is None:
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

    def multiply(self, x: Tensor, W: Tensor) -> Tensor:
        """x times W (out, in), without the bias."""
        raise NotImplementedError

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """The low-rank path's first half: x times A (r, in)."""
        return self.multiply(x, A)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        """The second half: h (..., r) times B (out, r)."""
        raise NotImplementedError

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        """Make W (out, in) and, where given, bias (out,) the layer's own."""
        raise NotImplementedError

    def spread(self, v: Tensor) -> Tensor:
        """v (out,) in a shape that broadcasts over the layer's output."""
        return v

    def deltas(self) -> "nn.ModuleDict":
        """Adapter name -> Delta, registered in the layer."""
        found = self.layer.deltas
        if not isinstance(found, nn.ModuleDict):
            raise StateError(f"{self.name!r} has an attribute 'deltas' of its own")
        return found

    def delta(self, adapter: str) -> Delta:
        """This site's delta of one adapter."""
        found = self.deltas()[adapter]
        if not isinstance(found, Delta):
            raise StateError(f"{adapter!r} at {self.name!r} is a {type(found).__name__}, no delta")
        return found

    def held(self) -> dict[str, Delta]:
        """Adapter name -> Delta without nn.ModuleDict's overhead: read on every forward pass."""
        return self.layer.__dict__["_modules"]["deltas"].__dict__["_modules"]

    # --- forward --------------------------------------------------------------------------------
    def forward(self, base: Base, x: Tensor) -> Tensor:
        """The adapted output for x, where `base` computes the layer's own."""
        if not torch.compiler.is_compiling():
            self.ran = True
            self.adapter_set.check_recomputed()
        if self.adapter_set.rows is not None:
            return self._by_rows(base, x, self.adapter_set.rows)
        found = self.held()
        active = [(found[n], c) for n, c in self.adapter_set.in_force() if n in found and c != 0.0]
        mixer = self._mixer(active)
        if mixer is not None:
            y = mixer(x, base(x), self._members(mixer, active, base))
        elif len(active) == 1:
            y = self._alone(base, x, *active[0])
        else:
            y = base(x)
            for delta, strength in active:
                y = y + self.change(delta, strength, x, base).to(y.dtype)
        if self.slots.overlays:
            for name, _ in self.adapter_set.active:
                y = self._overlaid(y, x, name)
        return y

    def _alone(self, base: Base, x: Tensor, delta: Delta, strength: float) -> Tensor:
        """One active delta: the cheapest way to the whole output."""
        simple = strength == 1.0 and not self._drops(delta) and not hooked(delta)
        if simple and self._around(delta) and not hooked(delta):
            return delta.through(x, base)
        y = base(x)
        return y + self.change(delta, strength, x, base).to(y.dtype)

    def _by_rows(self, base: Base, x: Tensor, rows: Rows) -> Tensor:
        """Another adapter, or none, for each row or packed position of x."""
        found = self.held()
        y: Tensor = base(x)
        shape, packed = y.shape, rows.lengths is not None
        if packed:
            x, y = self._flat(x), self._flat(y, output=True)
        if y.shape[0] != x.shape[0]:
            raise StateError(f"{self.name!r} changes the number of rows; rows() cannot follow")
        strength = {n: e.scale for n, e in self.adapter_set.entries.items()}
        for name, numbers in rows.index(x.shape[0], self.name, x.device):
            if name in found and strength[name] != 0.0:
                part = x.index_select(0, numbers)
                y = self._routed(y, numbers, part, found[name], strength[name], base)
        return y.view(shape) if packed else y

    def _flat(self, x: Tensor, output: bool = False) -> Tensor:
        """Positions first: (..., features) -> (positions, features)."""
        if not self.featured:
            raise StateError(f"{self.name!r}, a {self.kind}, cannot tell packed positions apart")
        return x.reshape(-1, x.shape[-1])

    def change(self, delta: Delta, strength: float, x: Tensor, base: Base) -> Tensor:
        """c [ drop(x) ΔWᵀ + (b − b0) ] for one delta, in the precision of its numbers."""
        if self._drops(delta) and x.is_floating_point():
            x = F.dropout(x, self._dropout(delta), training=True)
        moved = self._bias_change(delta)
        if hooked(delta):
            change = self._watched(delta, x)
        elif "low_rank" in delta.written:
            change = self._low_rank(delta, x, self._formed(delta))
        elif self._around(delta):
            return (delta.through(x, base) - base(x)) * strength
        elif self._direct(delta, x):
            change = delta.forward(x)
        else:
            change = self._gained(delta, x, delta.dense(delta.base_weight()))
        return (change if moved is None else change + self.spread(moved)) * strength

    def _around(self, delta: Delta) -> bool:
        """Whether `through` may be used: features last, the whole update, the original's base."""
        whole = self._gain(delta) is None and delta.origin is None and not self.adapter_set.merged
        return "through" in delta.written and self.featured and whole

    def _direct(self, delta: Delta, x: Tensor, formed: Factors | None = None) -> bool:
        """Whether the delta's own `forward` beats multiplying by what would have to be formed."""
        rows = x.numel() // max(x.shape[-1], 1)
        return (
            self.featured and self._gain(delta) is None and delta.direct(rows, formed is not None)
        )

    def _watched(self, delta: Delta, x: Tensor) -> Tensor:
        """The delta called as a module, so that hooks on it see x and ΔW x."""
        if not self.featured:
            raise StateError(f"hooks on {self.name!r}, a {self.kind}, would see no features")
        if self._gain(delta) is not None:
            raise StateError(f"a gain at {self.name!r} needs an update without hooks; remove them")
        change: Tensor = delta(x)
        return change

    def _formed(self, delta: Delta) -> Factors | None:
        factor_cache = self.adapter_set.entries[self._owner(delta)].factor_cache
        return None if factor_cache is None else factor_cache.factors(delta)

    def _low_rank(self, delta: Delta, x: Tensor, formed: Factors | None) -> Tensor:
        A, B = delta.factors() if formed is None else formed  # type: ignore[misc]
        gain = self._gain(delta)
        if gain is None:
            return self.up(self.down(x, A), B) * delta.scale
        value = self.up(self.down(x, A.detach()), B.detach())
        own = self.up(self.down(x.detach(), A), B) * self.spread(gain)
        return (value + (own - own.detach())) * delta.scale

    def _gained(self, delta: Delta, x: Tensor, W: Tensor) -> Tensor:
        if x.is_floating_point():
            x = x.to(W.dtype)
        gain = self._gain(delta)
        if gain is None:
            return self.multiply(x, W)
        own = self.multiply(x.detach(), W) * self.spread(gain)
        return self.multiply(x, W.detach()) + (own - own.detach())

    def _bias_change(self, delta: Delta) -> Tensor | None:
        moved = delta.bias_change() if "map_bias" in delta.written else None
        gain = None if moved is None else self._gain(delta)
        if moved is None or gain is None:
            return moved
        own = moved * gain
        return moved.detach() + (own - own.detach())

    def _dropout(self, delta: Delta) -> float:
        return self.adapter_set.entries[self._owner(delta)].structure.dropout

    def _drops(self, delta: Delta) -> bool:
        return delta.training and self._dropout(delta) > 0.0


def hooked(module: nn.Module) -> bool:
    """Whether anybody watches this module's forward or backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _GLOBAL._global_forward_hooks
        or _GLOBAL._global_forward_pre_hooks
        or _GLOBAL._global_backward_hooks
        or _GLOBAL._global_backward_pre_hooks
    )
