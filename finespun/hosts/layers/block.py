"""Bypasses: h ← F(h) + c·ΔW h around a whole block F, or around several in a row (a span)."""

import threading
from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from finespun.contract import Delta, Plan, SiteShape
from finespun.errors import PlanError, StateError, TargetError, nearest
from finespun.hosts.adapter_set import AdapterSet
from finespun.hosts.layers.host import Host, Way
from finespun.hosts.layers.slotted import Base
from finespun.hosts.layers.stored import Stored


class Span:
    """One bypass that reads the input of its first block and adds to the output of its last.

    What was read waits here until the last block runs, by thread. Where activations are recomputed
    in the backward pass, the last block runs before the first: `then` knows by the last block's
    input what was read. Copies and pickles carry nothing that waits.
    """

    def __init__(self, delta: Delta, first: str) -> None:
        self.delta, self.first = delta, first
        self.now: dict[int, Tensor | ReferenceType[Tensor]] = {}
        self.then = WeakTensorKeyDictionary()

    def __getstate__(self) -> tuple[Delta, str]:
        return self.delta, self.first

    def __setstate__(self, state: tuple[Delta, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def keep(self, x: Tensor) -> None:
        """The first block was given x."""
        compiling = torch.compiler.is_compiling()
        again = not compiling and torch._C._current_graph_task_id() != -1
        self.now[_thread()] = ref(x) if again else x

    def recall(self, x: Tensor) -> Tensor:
        """What the first block was given in the pass in which the last one is given x."""
        compiling = torch.compiler.is_compiling()
        found: Tensor | None = None if compiling else self.then.get(x)
        if found is None:
            kept = self.now.pop(_thread(), None)
            found = kept if kept is None or isinstance(kept, Tensor) else kept()
        if found is None or found.shape != x.shape:
            seen = "was not run before it" if found is None else f"was given {tuple(found.shape)}"
            raise StateError(
                f"the span from {self.first!r} ends at a block given {tuple(x.shape)}, but its "
                f"first {seen}; checkpointing needs use_reentrant=False"
            )
        if torch.is_grad_enabled() and not compiling:
            self.then[x] = found
        return found


class BlockHost(Host):
    """A block whose first input and first output are hidden states (..., width)."""

    kind: ClassVar[str] = "block"

    def __init__(self, layer: nn.Module, name: str, adapter_set: AdapterSet) -> None:
        super().__init__(layer, name, adapter_set)
        self.begins: dict[str, list[Span]] = {}
        self.ends: dict[str, list[Span]] = {}
        self.away: set[str] = set()

    @property
    def width(self) -> int:
        """The hidden size, read from the block's first linear layer or norm."""
        for module in self.layer.modules():
            if isinstance(module, nn.Linear):
                return module.in_features
            if isinstance(module, nn.LayerNorm):
                return int(module.normalized_shape[-1])
        raise TargetError(f"{self.name!r} has no linear layer or norm to read its width from")

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.name, self.width, self.width, self.kind)

    def _first(self) -> nn.Parameter:
        return next(p for n, p in self.layer.named_parameters() if "deltas." not in n)

    @property
    def dtype(self) -> torch.dtype:
        return self._first().dtype

    @property
    def device(self) -> torch.device:
        return self._first().device

    def stored(self) -> Stored:
        return self.weight(), None

    def weight(self) -> Tensor:
        raise StateError(f"{self.name!r} is a block: it has no weight of its own")

    def bias(self) -> Tensor | None:
        return None

    def multiply(self, x: Tensor, W: Tensor) -> Tensor:
        return nn.functional.linear(x, W)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return nn.functional.linear(x.to(A.dtype), A)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return nn.functional.linear(h, B)

    def write(self, W: Tensor, bias: Tensor | None = None) -> None:
        raise StateError(f"{self.name!r} is bypassed, not rewritten: nothing can be merged into it")

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise StateError(f"{self.name!r} was called without hidden states to bypass")
        out = base(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        added = super().forward(lambda _: first, hidden)
        return (added, *out[1:]) if isinstance(out, tuple) else added

    def calls(self, delta: Delta) -> bool:
        """Spans may begin or end where the block's own bypass is dead."""
        return True

    def change(
        self, delta: Delta, strength: float, x: Tensor, base: Base, way: Way | None = None
    ) -> Tensor:
        """The block's own bypass, unless a span took it away, and the spans that end here."""
        adapter = self._owner(delta)
        for span in self.begins.get(adapter, ()):
            span.keep(x)
        change = torch.zeros_like(x)
        if adapter not in self.away and not delta.dead:
            change = super().change(delta, strength, x, base, way)
        for span in self.ends.get(adapter, ()):
            read = span.recall(x)
            if not span.delta.dead:
                change = change + super().change(span.delta, strength, read, base)
        return change


def link(adapter: str, plan: Plan, deltas: Mapping[str, Delta]) -> None:
    """Let each bypass go around the blocks that the plan's choice `span` = [first, last] says, else
    around its own. Raises PlanError for a span whose ends are no blocks of the plan."""
    hosts = {n: d.site for n, d in deltas.items() if isinstance(d.site, BlockHost)}
    for host in hosts.values():
        host.begins[adapter], host.ends[adapter] = [], []
        host.away.discard(adapter)
    for name, host in hosts.items():
        ends = plan.choices.get(name, {}).get("span") or (name, name)
        if not isinstance(ends, list | tuple) or len(ends) != 2:
            raise PlanError(f"the span of {name!r} is {ends!r}; it names a first and a last block")
        first, last = map(str, ends)
        if first == last == name:
            continue
        for end in (first, last):
            if end not in hosts:
                raise PlanError(f"the span of {name!r} has no block {end!r}; {nearest(end, hosts)}")
        span = Span(deltas[name], first)
        host.away.add(adapter)
        hosts[first].begins[adapter].append(span)
        hosts[last].ends[adapter].append(span)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
