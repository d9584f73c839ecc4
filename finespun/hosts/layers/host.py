"""The adapted layer: a host's own module object with a subclass put in front of its class.

    y = base(x) + Σ c_i [ drop_i(x) (W_i − W0)ᵀ + (b_i − b0) ],   W_i = map_weight_i(W0)

always from the original W0. The layer names no method: which of the forms that a delta
wrote is used, and how, is the table in `hosts/paths.py`.
"""

import copy
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.contract import Coupling, Delta
from finespun.contract.delta import Factors
from finespun.errors import StateError, an
from finespun.hosts import paths
from finespun.hosts.adapter_set import AdapterSet, Rows
from finespun.hosts.layers.layer import OWN_FORWARD, plain_class
from finespun.hosts.layers.slotted import Base, Slotted
from finespun.hosts.layers.stored import StoredLayer
from finespun.hosts.slots import SiteSlots
from finespun.kernels.lowrank import low_rank_fused, low_rank_linear_reference, plain

Way = tuple[paths.Path, Factors | None]
LINEAR_FORWARD = nn.Linear.forward


class Host(StoredLayer, Slotted):
    """Where deltas attach at one module; the object beside the layer that represents it.

    A host is also the Site that its deltas see. Five verbs hide the kind of layer: `weight()` as
    (out, in), `multiply(x, W)`, `down(x, A)`, `up(h, B)` and `write(W)`. `slots` holds gains,
    overlays and mixers by adapter. `featured` says that the last dimension of x and y holds the
    features, `fusable` that the layer is an nn.Linear as the fused kernel needs it, `sliced` that
    the update reaches some of its outputs.
    """

    kind: ClassVar[str] = ""
    featured: ClassVar[bool] = True
    fusable: ClassVar[bool] = False
    sliced: ClassVar[bool] = False
    coupling: Coupling | None = None

    def __init__(self, layer: nn.Module, name: str, adapter_set: AdapterSet) -> None:
        super().__init__(layer, name, adapter_set)
        self.ran, self.slots = False, SiteSlots()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Host":
        """A host goes with its layer: copied with the model, shared by a copy of a delta alone."""
        if id(self.layer) not in memo and id(self.adapter_set) not in memo:
            return self
        twin = memo[id(self)] = copy.copy(self)
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return twin

    def multiply(self, x: Tensor, W: Tensor) -> Tensor:
        """x times W (out, in), without the bias."""
        raise NotImplementedError

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """The low-rank path's first half: x times A (r, in)."""
        return self.multiply(x, A)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        """The second half: h (..., r) times B (out, r)."""
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
        strengths = [(n, c) for n, c in self.adapter_set.in_force() if n in found and c != 0.0]
        active = [(found[n], c) for n, c in strengths if self.calls(found[n])]
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

    def calls(self, delta: Delta) -> bool:
        """Whether a delta has a part in the output: a dead one has none."""
        return not delta.dead

    def _alone(self, base: Base, x: Tensor, delta: Delta, strength: float) -> Tensor:
        """One update, nothing beside it: it may make the whole output."""
        way = path, pair = self.way(delta, strength, x, alone=True)
        if path == "around":
            return delta.through(x, base)
        if path in ("fused", "operators"):
            multiply = low_rank_fused if path == "fused" else low_rank_linear_reference
            weight, bias, (A, B) = self.layer.weight, self.layer.bias, pair  # type: ignore[misc]
            s, drop = delta.scale * strength, self._dropout(delta) if delta.training else 0.0
            y = multiply(x, weight, bias, A, B, s, self._gain(delta), drop)
            moved = self._bias_change(delta)
            return y if moved is None else y + (moved * strength).to(y.dtype)
        y = base(x)
        return y + self.change(delta, strength, x, base, way).to(y.dtype)

    def _by_rows(self, base: Base, x: Tensor, rows: Rows) -> Tensor:
        """Another adapter, or none, for each row or packed position of x."""
        found = self.held()
        y: Tensor = base(x)
        shape, packed = y.shape, rows.lengths is not None
        if packed:
            x, y = self._flat(x), self._flat(y, output=True)
        if y.shape[0] != x.shape[0]:
            raise StateError(f"{self.name!r} changes the number of rows; rows() cannot follow")
        strength = {n: a.strength for n, a in self.adapter_set.attached.items()}
        for name, numbers in rows.index(x.shape[0], self.name, x.device):
            if name in found and strength[name] != 0.0 and self.calls(found[name]):
                part = x.index_select(0, numbers)
                y = self._routed(y, numbers, part, found[name], strength[name], base)
        return y.view(shape) if packed else y

    def _flat(self, x: Tensor, output: bool = False) -> Tensor:
        """Positions first: (..., features) -> (positions, features)."""
        if not self.featured:
            raise StateError(f"{self.name!r}, {an(self.kind)}, cannot distinguish packed positions")
        return x.reshape(-1, x.shape[-1])

    def way(self, delta: Delta, strength: float, x: Tensor, alone: bool = False) -> Way:
        """The path that the table gives for this update now, and its factors where they are needed.
        Columns that no row asks for, given the others, are not read."""
        fixed, now = delta.__dict__["columns"], paths.ALONE if alone else 0
        if self._gain(delta) is not None:
            now |= paths.GAIN
        if paths.watched(delta):
            return paths.choose(fixed, now | paths.WATCHED), None
        pair: Factors | None = None
        formed = False
        if fixed & paths.FACTORS:
            pair = self._formed(delta)
            formed = pair is not None
        own_way = paths.PRODUCT | paths.FEATURES
        if fixed & own_way == own_way and not now & paths.GAIN:
            count = x.numel() // max(x.shape[-1], 1)
            now |= paths.CHEAPER if delta.direct(count, formed) else 0
        if fixed & paths.THROUGH:
            now |= self._around(delta, strength)
        if fixed & paths.FACTORS and not now & paths.CHEAPER:
            A, B = pair = delta.factors() if pair is None else pair  # type: ignore[misc]
            if fixed & paths.LINEAR and alone and self._plain():
                now |= paths.PLAIN
                now |= paths.ORDINARY if plain(x, self.layer.weight, A, B) else 0
        return paths.choose(fixed, now), pair

    def _around(self, delta: Delta, strength: float) -> int:
        """The columns that decide whether `through` may be used."""
        now = paths.UNIT if strength == 1.0 else 0
        if self._drops(delta):
            now |= paths.DROPS
        if delta.origin is not None:
            now |= paths.START
        return now | paths.MERGED if self.adapter_set.merged else now

    def _plain(self) -> bool:
        """Whether the layer computes as nn.Linear does."""
        own = plain_class(self.layer).forward is LINEAR_FORWARD
        return own and OWN_FORWARD not in self.layer.__dict__

    def change(
        self, delta: Delta, strength: float, x: Tensor, base: Base, way: Way | None = None
    ) -> Tensor:
        """c [ drop(x) ΔWᵀ + (b − b0) ] for one delta, in the precision of its parameters."""
        path, pair = way or self.way(delta, strength, x)
        if self._drops(delta) and x.is_floating_point():
            x = F.dropout(x, self._dropout(delta), training=True)
        if path == "through":
            return (delta.through(x, base) - base(x)) * strength
        if path == "refused":
            self._refuse()
        moved = self._bias_change(delta)
        if path == "factors":
            change = self._low_rank(delta, x, *pair)  # type: ignore[misc]
        elif path == "dense":
            change = self._dense(delta, x)
        else:
            change = delta(x) if path == "forward" else delta.forward(x)
        return (change if moved is None else change + self.spread(moved)) * strength

    def _refuse(self) -> NoReturn:
        """Raise StateError: hooks sit on an update that cannot be called as a module."""
        if not self.featured:
            raise StateError(f"hooks on {self.name!r}, {an(self.kind)}, would see no features")
        raise StateError(f"a gain at {self.name!r} needs an update without hooks; remove them")

    def _formed(self, delta: Delta) -> Factors | None:
        factor_cache = self.adapter_set.attached[self._owner(delta)].factor_cache
        return None if factor_cache is None else factor_cache.factors(delta)

    def _low_rank(self, delta: Delta, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        gain = self._gain(delta)
        if gain is None:
            return self.up(self.down(x, A), B) * delta.scale
        value = self.up(self.down(x, A.detach()), B.detach())
        own = self.up(self.down(x.detach(), A), B) * self.spread(gain)
        return (value + (own - own.detach())) * delta.scale

    def _dense(self, delta: Delta, x: Tensor) -> Tensor:
        W, gain = delta.dense(delta.base_weight()), self._gain(delta)
        if x.is_floating_point():
            x = x.to(W.dtype)
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
        return self.adapter_set.attached[self._owner(delta)].structure.dropout

    def _drops(self, delta: Delta) -> bool:
        return delta.training and self._dropout(delta) > 0.0
