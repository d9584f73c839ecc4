"""A live adapter: its modules in a model, which are its truth while they stand there."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from finespun.adapters.fingerprint import Fingerprint
from finespun.adapters.keys import Key, by_owner, of_bank, of_module, of_site, spelt, started
from finespun.adapters.lineage import Lineage
from finespun.adapters.state import AdapterState, Form
from finespun.contract import Bank, Delta, Plan, Structure
from finespun.contract.roles import role_of
from finespun.errors import InputError, StateError, nearest
from finespun.hosts.buffers import Buffers
from finespun.hosts.factor_cache import FactorCache
from finespun.linalg import LowRank


@dataclass(eq=False)
class Attached:
    """One adapter's modules: a delta for each site, their bank, and copies of the modules that it
    trains (`trained`, a fresh head say). `strength` multiplies the whole update; `buffers` knows
    what its training made of the base's buffers."""

    name: str
    structure: Structure
    plan: Plan
    trained: tuple[str, ...] = ()
    strength: float = 1.0
    lineage: Lineage | None = None
    base: Fingerprint | None = None
    deltas: dict[str, Delta] = field(default_factory=dict)
    copies: dict[str, nn.Module] = field(default_factory=dict)
    bank: Bank | None = None
    factor_cache: FactorCache | None = None
    watched: bool = False
    buffers: Buffers | None = None

    @classmethod
    def of(cls, state: AdapterState) -> "Attached":
        """What a state will be attached as, without modules yet."""
        return cls(
            state.name,
            state.structure,
            state.plan,
            state.trained,
            state.strength,
            state.lineage,
            state.base,
        )

    def update_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the deltas and of their bank."""
        named = [] if self.bank is None else self.bank.named_parameters()
        shared = [p for name, p in named if role_of(name)[0] != "start"]
        return [*(p for d in self.deltas.values() for p in d.trained_parameters()), *shared]

    def module_parameters(self) -> list[nn.Parameter]:
        """The parameters of the copies of modules."""
        return [p for module in self.copies.values() for p in module.parameters()]

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that training moves: of updates, bank, and copies of modules."""
        return [*self.update_parameters(), *self.module_parameters()]

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """‖ΔW‖_F of every site that changes a weight, strength left out."""
        found = {}
        for name, delta in self.deltas.items():
            pair = delta.factors()
            norm = (
                LowRank(pair[0], pair[1] * delta.scale).norm()
                if pair
                else delta.dense(delta.base_weight()).norm()
            )
            found[name] = float(norm)
        return found

    def tensors(self) -> dict[Key, Tensor]:
        """Live views of every tensor that belongs to the adapter. Raises StateError where a process
        holds only its shard of them."""
        found: dict[Key, Tensor] = {}
        for name, delta in self.deltas.items():
            found |= of_site(name, delta.state_dict())
        if self.bank is not None:
            found |= of_bank(self.bank.state_dict())
        for name, module in self.copies.items():
            found |= of_module(name, module.state_dict())
        moved = {} if self.buffers is None else self.buffers.moved(self.name)
        found |= {Key("module", *place, "buffer"): value for place, value in moved.items()}
        if any(hasattr(tensor, "full_tensor") for tensor in found.values()):
            raise StateError(
                f"{self.name!r} is sharded over processes: gather the model's state with "
                "get_model_state_dict(full_state_dict=True) into a model that is not, and save "
                "there"
            )
        return found

    def lent(self) -> AdapterState:
        """The adapter as a state over live views, for as long as nothing trains: what is written to
        a file is not copied first."""
        tensors = self.tensors()
        form = Form.of(self.structure, self.plan, self.trained, tensors)
        return AdapterState(self.name, form, tensors, self.strength, self.lineage, self.base)

    def snapshot(self, dtypes: Mapping[Key, torch.dtype] | None = None) -> AdapterState:
        """A copy of the adapter on the CPU, which later training leaves alone; `dtypes` of tensors
        where they are to be others."""
        tensors = self.tensors()
        for key, dtype in (dtypes or {}).items():
            if key in tensors:
                tensors[key] = tensors[key].to(dtype)
        return AdapterState.pack(
            self.name,
            self.structure,
            self.plan,
            tensors,
            self.trained,
            self.strength,
            self.lineage,
            self.base,
        )

    def asleep(self, registered: AdapterState | None) -> AdapterState:
        """What stays when the modules go: the registered tensors themselves while nothing was
        trained, else a copy in their dtypes."""
        if registered is None:
            return self.snapshot()
        if not self._holds(registered):
            return self.snapshot({k: slot.dtype for k, slot in registered.form.table.items()})
        return dataclasses.replace(
            registered, strength=self.strength, lineage=self.lineage, base=self.base
        )

    def _holds(self, registered: AdapterState) -> bool:
        """Whether everything is still what the registered state gave it."""
        form, own = registered.form, self.tensors()
        return (
            (form.structure, form.plan, form.trained) == (self.structure, self.plan, self.trained)
            and own.keys() == registered.tensors.keys()
            and all(
                torch.equal(own[key].cpu(), tensor.to(own[key].dtype))
                for key, tensor in registered.tensors.items()
            )
        )

    def load(self, tensors: Mapping[Key, Tensor]) -> None:
        """Copy tensors into the modules. Raises InputError naming the first key that is missing,
        unknown or of another shape; nothing is changed then."""
        starts = started(tensors)
        begun = []
        moved = {(k.place, k.name): tensors[k] for k in tensors if k.role == "buffer"}
        for name, delta in self.deltas.items():
            if starts & {("bank", ""), ("site", name)} and delta.origin is None:
                delta.keep_start()
                begun.append(delta)
        try:
            if self.buffers is not None:
                self.buffers.check(moved)
            _check(self.tensors(), tensors)
        except InputError:
            holders: list[nn.Module] = [*begun, *(d.bank for d in begun if d.bank is not None)]
            for holder in holders:
                holder._modules.pop("start", None)
            raise
        states = by_owner(tensors)
        for owner, module in self._modules():
            module.load_state_dict(states.get((owner.owner, owner.place), {}))
        if self.buffers is not None:
            self.buffers.give(self.name, moved)

    def _modules(self) -> Iterator[tuple[Key, nn.Module]]:
        for name, delta in self.deltas.items():
            yield Key("site", name, ""), delta
        if self.bank is not None:
            yield Key("bank", "", ""), self.bank
        for name, module in self.copies.items():
            yield Key("module", name, ""), module


def _check(own: Mapping[Key, Tensor], tensors: Mapping[Key, Tensor]) -> None:
    extra = {key for key in tensors if key.within.role in ("gate", "mask", "dead", "buffer")}
    for key in own.keys() - tensors.keys():
        if key.role in ("dead", "buffer"):
            continue  # asleep when built, awake in the file; moved here, the base's in the file
        raise InputError(f"tensor {key!r} is missing; {nearest(str(key), spelt(tensors))}")
    for key in tensors.keys() - own.keys() - extra:
        raise InputError(f"tensor {key!r} belongs to nothing here; {nearest(str(key), spelt(own))}")
    for key, tensor in own.items():
        if key in tensors and tensors[key].shape != tensor.shape:
            found, wanted = tuple(tensors[key].shape), tuple(tensor.shape)
            raise InputError(f"{key!r} is {found}, expected {wanted}")
