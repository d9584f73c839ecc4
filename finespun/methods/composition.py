"""Which methods go together, from what they need: the recipe's refusals and the docs' table."""

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from finespun.contract.delta import Delta
from finespun.contract.method import Method
from finespun.contract.need import OFFERED, SINGLE, Need
from finespun.contract.site import TensorSite
from finespun.contract.structure import Structure, Unmeasured
from finespun.errors import FinespunError, InputError
from finespun.methods.axes import AXES

WIDTH = 768


def agree(values: Sequence[Method]) -> None:
    """Raise InputError where a run cannot have these values, or two of them together, naming both
    and what would do."""
    structures = [value for value in values if isinstance(value, Structure)]
    for structure in structures:
        possible(structure)
    for i, value in enumerate(values):
        for structure in structures:
            if value is not structure:
                suits(value, structure)
        for other in values[:i]:
            for need in sorted(value.needs & other.needs & SINGLE):
                raise InputError(
                    f"{value.kind} beside {other.kind}: both bring a {need}, and a run has one; "
                    f"leave one of them out{instead(value, need) or instead(other, need)}"
                )


def suits(value: Any, structure: Structure) -> None:
    """Raise InputError where a value of another axis is not for this structure."""
    value.suits(structure)
    for need in sorted(value.needs & OFFERED):
        if need not in offers(structure):
            raise InputError(
                f"{value.kind} needs {need}, which {structure.kind} does not have"
                f"{instead(structure, need) or instead(value, need)}; structures that have: "
                f"{', '.join(offering(need))}"
            )


def possible(structure: Structure) -> None:
    """Raise InputError where a recipe cannot set a structure up by itself."""
    if Need.PYTHON in structure.needs:
        raise InputError(
            f"{structure.kind} needs {Need.PYTHON}, which no recipe makes"
            f"{instead(structure, Need.PYTHON)}"
        )


def instead(method: Method, need: Need) -> str:
    """The option of a method by which it has or has not this need, with the value that would do
    (its default), as the end of a sentence; "" where no single option decides."""

    def has(one: Method) -> bool:
        return need in (
            offers(one) if isinstance(one, Structure) and need in OFFERED else one.needs
        )

    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if value != field.default:
            other = dataclasses.replace(method, **{field.name: field.default})
            if has(other) != has(method):
                return f" with {field.name}={value!r}; try {field.name}={field.default!r}"
    return ""


@cache
def offers(structure: Structure) -> frozenset[Need]:
    """What methods on other axes may find in this structure's updates, seen at one that is built
    for a layer of 768 x 768; everything where these options do not fit such a layer."""
    weight = torch.zeros(WIDTH, WIDTH)
    site = TensorSite("layer", weight, torch.zeros(WIDTH), structure.site_kind)
    try:
        plan = structure.plan([site], Unmeasured())
        delta = structure.build(site, plan, structure.bank(plan))
    except FinespunError:
        return OFFERED  # the model's own layers decide when the run begins
    found = set()
    if "low_rank" in delta.written:
        found |= {Need.FACTORS, Need.GATES}
    if delta.products():
        found.add(Need.PRODUCTS)
    if type(delta).take_factors is not Delta.take_factors:
        found.add(Need.SIDES)
    return frozenset(found)


def offering(need: Need) -> list[str]:
    """Kinds of the structures that offer this by their defaults."""
    return [k for k, cls in sorted(AXES["structure"].known.items()) if need in offers(cls())]
