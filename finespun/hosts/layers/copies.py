"""Trained things that are no delta: an adapter's own copy of a module, a fresh head above all."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from finespun.errors import StateError
from finespun.hosts.adapter_set import AdapterSet, Rows
from finespun.hosts.layers.layer import plain_class

HALVES = (torch.float16, torch.bfloat16)


class CopyHost:
    """Stands beside a module and chooses between it and the adapters' copies of it, by the same
    activation and rows as deltas. Copies live in the module's `copies`, the original is frozen."""

    def __init__(self, layer: nn.Module, name: str, adapter_set: AdapterSet) -> None:
        self.layer, self.name, self.adapter_set = layer, name, adapter_set
        self.ran = False

    def copies(self) -> nn.ModuleDict:
        """Adapter name -> its own copy, registered in the module."""
        found = self.layer._modules["copies"]
        if not isinstance(found, nn.ModuleDict):
            raise StateError(f"{self.name!r} has a child 'copies' of its own")
        return found

    def original(self) -> nn.Module:
        """A fresh copy of the module as it was before any adapter."""
        twin = copy.copy(self.layer)
        twin.__class__ = plain_class(self.layer)
        twin.__dict__ = {k: v for k, v in self.layer.__dict__.items() if k != "_finespun"}
        twin._modules = {k: v for k, v in self.layer._modules.items() if k != "copies"}
        return copy.deepcopy(twin)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.ran = True
            self.adapter_set.check_recomputed()
        copies = self.copies()
        if self.adapter_set.rows is not None:
            return self._by_rows(base, copies, self.adapter_set.rows, *args, **kwargs)
        mine = [name for name, _ in self.adapter_set.active if name in copies]
        if len(mine) > 1:
            raise StateError(
                f"adapters {', '.join(map(repr, mine))} each have their own {self.name!r}: "
                "activate one of them, or give each row its own with rows()"
            )
        if not mine:
            return base(*args, **kwargs)
        return self._own(copies[mine[0]], *args, **kwargs)

    def _own(self, twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a copy makes of its inputs; one of more precision than the module is shown and gives
        tensors as the module would."""
        narrow, wide = _precision(self.layer), _precision(twin)
        if narrow == wide or narrow not in HALVES:
            return twin(*args, **kwargs)
        inputs = _cast((args, kwargs), narrow, wide)
        return _cast(twin(*inputs[0], **inputs[1]), wide, narrow)

    def _by_rows(
        self, base: Any, copies: nn.ModuleDict, rows: Rows, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        y = base(x, *args, **kwargs)
        shape, packed = y.shape, rows.lengths is not None and y.dim() == x.dim()
        if packed:
            x, y = x.flatten(0, -2), y.flatten(0, -2)
        for name, numbers in rows.index(x.shape[0], self.name, x.device):
            if name not in copies:
                continue
            part = self._own(copies[name], x.index_select(0, numbers), *args, **kwargs)
            if part.shape[1:] != y.shape[1:]:
                raise StateError(
                    f"rows cannot be mixed: with {name!r}, {self.name!r} gives "
                    f"{tuple(part.shape[1:])} numbers a row, without it {tuple(y.shape[1:])}"
                )
            y = y.index_copy(0, numbers, part.to(y.dtype))
        return y.view(shape) if packed else y


def widened(module: nn.Module) -> nn.Module:
    """The module in float32 where it is of half precision, in which it would not train: a step of
    an optimiser is smaller than the dtype can represent, its squared gradients underflow."""
    with torch.no_grad():
        return module._apply(lambda t: t.float() if t.dtype in HALVES else t)


def _precision(module: nn.Module) -> torch.dtype:
    """The dtype of the first floating parameter, which is the module's own where copies stand
    beside it."""
    found = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(found, torch.float32)


def _cast(tree: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(new) if isinstance(t, Tensor) and t.dtype == old else t, tree)
