"""An adapter without a model: what it is made of, its tensors, and where it comes from."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from finespun.adapters.fingerprint import Fingerprint
from finespun.adapters.keys import Key, held_by
from finespun.adapters.lineage import Lineage
from finespun.adapters.packed import PackedTensors, Slot, Table, table_of
from finespun.contract import Plan, Structure

_KNOWN: "WeakValueDictionary[str, Form]" = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Form:
    """What adapters alike have in common: structure, plan, the names of modules of which they hold
    copies, and the key, shape, dtype and place of every tensor.

    `Form.of` gives the same object for the same content, so that forms are compared by `is` and a
    thousand states hold one.
    """

    structure: Structure
    plan: Plan
    trained: tuple[str, ...]
    table: Table

    @classmethod
    def of(
        cls, structure: Structure, plan: Plan, trained: Iterable[str], tensors: Mapping[Key, Tensor]
    ) -> "Form":
        """The form of tensors that were made so."""
        return cls(structure, plan, tuple(trained), table_of(tensors)).shared()

    def shared(self) -> "Form":
        """The one form of this content that is in use, or this one from now on."""
        return _KNOWN.setdefault(self.digest, self)

    def fits(self, other: "Form") -> bool:
        """Whether tensors of the other can be copied into one of this form: all is the same but
        dtypes, and options that act while training only."""
        return (
            self.structure.kind == other.structure.kind
            and (self.plan, self.trained) == (other.plan, other.trained)
            and {k: s.shape for k, s in self.table.items()}
            == {k: s.shape for k, s in other.table.items()}
        )

    @cached_property
    def digest(self) -> str:
        """Equal for equal content."""
        slots = [[str(key), list(s.shape), str(s.dtype)] for key, s in self.table.items()]
        made = [self.structure.kind, self.structure.options(), plan_as_json(self.plan)]
        content = json.dumps([made, self.trained, slots])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, eq=False, slots=True)
class AdapterState:
    """One adapter, immutable by contract: nobody writes into its tensors, and modules are given
    copies.

    `tensors` are views of one packed buffer, or of a live adapter's modules where a state is only
    lent (`Attached.lent`). `strength` multiplies the whole update; `lineage` says who made it and
    `base` for which model, where that is known.
    """

    name: str
    form: Form
    tensors: Mapping[Key, Tensor]
    strength: float = 1.0
    lineage: Lineage | None = None
    base: Fingerprint | None = None

    @classmethod
    def pack(
        cls,
        name: str,
        structure: Structure,
        plan: Plan,
        tensors: Mapping[Key, Tensor],
        trained: Iterable[str] = (),
        strength: float = 1.0,
        lineage: Lineage | None = None,
        base: Fingerprint | None = None,
    ) -> "AdapterState":
        """A state with a copy of these tensors."""
        form = Form.of(structure, plan, trained, tensors)
        packed = PackedTensors.pack(tensors, form.table)
        return cls(name, form, packed, strength, lineage, base)

    @property
    def structure(self) -> Structure:
        return self.form.structure

    @property
    def plan(self) -> Plan:
        return self.form.plan

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the modules of which the adapter holds its own copy."""
        return self.form.trained

    @property
    def num_parameters(self) -> int:
        """Parameters of the updates as they are stored: starts, gates, masks, places that a method
        chose (whole numbers) and modules left out."""
        table = self.form.table.items()
        return sum(_count(s) for k, s in table if k.counted and s.dtype.is_floating_point)

    @property
    def num_module_parameters(self) -> int:
        """Parameters in the adapter's copies of modules."""
        return sum(
            _count(slot)
            for key, slot in self.form.table.items()
            if key.owner == "module" and key.role != "buffer"
        )

    def module(self, name: str) -> dict[str, Tensor]:
        """The state of the adapter's copy of a module."""
        return held_by("module", name, self.tensors)

    def named(self, name: str) -> "AdapterState":
        """The same adapter under another name; the tensors are the same."""
        return dataclasses.replace(self, name=name)

    def with_tensors(
        self,
        tensors: Mapping[Key, Tensor],
        plan: Plan | None = None,
        trained: Iterable[str] | None = None,
    ) -> "AdapterState":
        """The same adapter with a copy of other tensors, of another plan or other copies of modules
        where they are given."""
        return dataclasses.replace(
            AdapterState.pack(
                self.name,
                self.structure,
                self.plan if plan is None else plan,
                tensors,
                self.trained if trained is None else trained,
            ),
            strength=self.strength,
            lineage=self.lineage,
            base=self.base,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdapterState":
        return self

    def shared(self) -> "AdapterState":
        """The same adapter, holding with all others what it has in common with them."""
        base, line = self.base, self.lineage
        return dataclasses.replace(
            self,
            base=None if base is None else base.shared(),
            lineage=None if line is None else line.shared(),
        )


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Sites as [name, out, in, kind], choices site by site, and what is shared."""
    return {
        "sites": [[s.name, s.out_features, s.in_features, s.kind] for s in plan.sites],
        "choices": {name: dict(choice) for name, choice in plan.choices.items()},
        "shared": dict(plan.shared),
    }


def _count(slot: Slot) -> int:
    return slot.shape.numel()
