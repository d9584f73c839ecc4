"""The axes in recipes and bench files: a value on each, read, checked and written by one table."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from finespun.contract import Allocation, Dynamics, Initializer, Objective, Structure
from finespun.contract.method import Method
from finespun.contract.need import Need
from finespun.errors import InputError
from finespun.methods.axes import AXES, Axis
from finespun.methods.composition import agree
from finespun.methods.structures.lsr import LSR
from finespun.recipes.yaml import Section


def read_method(value: Any, axis: Axis) -> Method:
    """A method from `{"kind": ..., option: ...}`; one that is of the axis passes as it is.

    Raises InputError for an unknown kind or option, pydantic's ValidationError for a wrong type.
    """
    if isinstance(value, axis.base):
        return value
    if not isinstance(value, Mapping) or "kind" not in value:
        raise InputError(f"{value!r} needs a kind, one of {', '.join(map(repr, axis.known))}")
    method = axis.find(value["kind"])
    options = method.renamed({key: item for key, item in value.items() if key != "kind"})
    return TypeAdapter(method).validate_python(options)


def write_method(method: Method) -> dict[str, Any]:
    """The inverse of `read_method`, every option written out."""
    return {"kind": method.kind, **method.options()}


def method_schema(method: type[Method]) -> dict[str, Any]:
    """The JSON Schema of a method, options included."""
    options = TypeAdapter(method).json_schema()
    options["properties"] = {"kind": {"const": method.kind}, **options["properties"]}
    return {**options, "required": ["kind"], "additionalProperties": False}


class ValueOf:
    """A field's value on an axis; None for none where the axis allows it.

    It is checked against the values on the axes that stand before it in the same section.
    """

    def __init__(self, axis: str, alone: bool = False) -> None:
        self.axis, self.alone = AXES[axis], alone

    def read(self, value: Any, info: ValidationInfo) -> Method | None:
        """The value. Raises InputError where no run can have it, or none beside the others."""
        if value is None and not self.axis.required:
            return None
        found = read_method(value, self.axis)
        if not self.alone:
            others = [one for name in AXES if (one := info.data.get(name)) is not None]
            agree([*others, found])
        return found

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(
            lambda method: method and write_method(method)
        )
        return core_schema.with_info_plain_validator_function(self.read, serialization=written)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        found = [method_schema(cls) for _, cls in sorted(self.axis.known.items())]
        return {"oneOf": found if self.axis.required else [{"type": "null"}, *found]}


def chosen(axis: str, default: Method | None = None) -> Any:
    """The field of an axis, described by its question."""
    absent = "" if AXES[axis].required else "; null: nothing"
    return Field(default, description=AXES[axis].question + absent)


class Chosen(Section):
    """A value on every axis."""

    structure: Annotated[Structure, ValueOf("structure")] = chosen("structure", LSR())
    initializer: Annotated[Initializer | None, ValueOf("initializer")] = chosen("initializer")
    allocation: Annotated[Allocation | None, ValueOf("allocation")] = chosen("allocation")
    dynamics: Annotated[Dynamics | None, ValueOf("dynamics")] = chosen("dynamics")
    objective: Annotated[Objective | None, ValueOf("objective")] = chosen("objective")

    @property
    def values(self) -> dict[str, Method]:
        """Axis -> value, of the axes where one is chosen."""
        found = {name: getattr(self, name) for name in AXES}
        return {name: value for name, value in found.items() if value is not None}

    def needs(self, but: str = "") -> frozenset[Need]:
        """What the values need, of all axes `but` one."""
        return frozenset(n for a, v in self.values.items() if a != but for n in v.needs)
