"""A recipe: the one typed description of a run, read from YAML, checked before anything is loaded.

Every key can be overridden as `section.key=value`, with the value in YAML. An unknown key or an
impossible value is an InputError that names the key, the line, the value and what would work.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, cast

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from finespun.contract import Structure
from finespun.contract.allocation import Allocation
from finespun.contract.method import Method
from finespun.errors import InputError, nearest
from finespun.methods.allocation import ALLOCATIONS
from finespun.methods.structures import LSR, STRUCTURES
from finespun.recipes.data import Data
from finespun.recipes.training import HEAD_LR, Training
from finespun.recipes.yaml import Document, Quoting

M = TypeVar("M", bound=Method)


def read_method(value: Any, known: Mapping[str, type[M]]) -> M:
    """A method from `{"kind": ..., option: ...}`; a method passes as it is.

    Raises InputError for an unknown kind or option, pydantic's ValidationError for a wrong type.
    """
    if isinstance(value, Method):
        return cast(M, value)
    if not isinstance(value, Mapping) or "kind" not in value:
        raise InputError(f"{value!r} needs a kind, one of {', '.join(map(repr, known))}")
    kind = value["kind"]
    if kind not in known:
        raise InputError(f"kind {kind!r} is not known; {nearest(str(kind), known)}")
    options = known[kind].renamed({key: item for key, item in value.items() if key != "kind"})
    return TypeAdapter(known[kind]).validate_python(options)


def write_method(method: Method) -> dict[str, Any]:
    """The inverse of `read_method`, every option written out."""
    return {"kind": method.kind, **method.options()}


def read_structure(value: Any) -> Structure:
    """A structure, by `read_method`."""
    return read_method(value, STRUCTURES)


def read_allocation(value: Any) -> Allocation | None:
    """An allocation, by `read_method`; None for none."""
    return None if value is None else read_method(value, ALLOCATIONS)


def trainable(structure: Structure) -> Structure:
    """The structure. Raises InputError where a run cannot set it up by itself."""
    if structure.needs_python:
        raise InputError(structure.needs_python)
    return structure


def suited(allocation: Allocation | None, info: ValidationInfo) -> Allocation | None:
    """The allocation. Raises InputError where it is not for the structure beside it."""
    if allocation is not None and "structure" in info.data:
        allocation.suits(info.data["structure"])
    return allocation


_WRITTEN = PlainSerializer(lambda method: method and write_method(method))
_SCHEMA = WithJsonSchema({"type": "object"})
AnyStructure = Annotated[Structure, BeforeValidator(read_structure), _WRITTEN, _SCHEMA]
RunStructure = Annotated[AnyStructure, AfterValidator(trainable)]
AnyAllocation = Annotated[
    Allocation | None,
    BeforeValidator(read_allocation),
    AfterValidator(suited),
    _WRITTEN,
    _SCHEMA,
]


class Recipe(Document):
    """A run, whole: the same recipe gives the same adapter on the same machine and threads."""

    model: str = Field(description="minilm-l6, minilm-l3, smollm2-135m, a folder or a hub model")
    data: Data
    structure: RunStructure = Field(LSR(), description="how the update is written")
    targets: Annotated[str, Field(min_length=1)] | tuple[str, ...] = Field(
        "all-linear", description="layers by name or suffix, a regex, all-linear, or [] for none"
    )
    train_modules: tuple[str, ...] | None = Field(
        None, description="other modules to train; null: the untrained head"
    )
    allocation: AnyAllocation = Field(
        None, description="what changes in the updates while they train; null: nothing"
    )
    training: Training = Training()
    output: str = Field("out", min_length=1, description="the folder that the run writes")
    trackers: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = Field(
        (), description="programs that follow the run, each an extra of its own"
    )

    @model_validator(mode="after")
    def _packs(self) -> Self:
        if self.training.pack and not self.data.packs:
            raise InputError("training.pack is for language models: it needs data.prompt")
        return self

    @property
    def lr(self) -> float:
        """The learning rate: the recipe's, else the default of its structure."""
        if self.training.lr is not None:
            return self.training.lr
        return self.structure.usual_lr

    @property
    def head_lr(self) -> float:
        """The learning rate of modules trained whole: the recipe's, else that of an untrained head,
        or the updates' own where the recipe names modules."""
        if self.training.head_lr is not None:
            return self.training.head_lr
        return HEAD_LR if self.train_modules is None else self.lr

    def changed(self, overrides: Sequence[str]) -> Self:
        """The same recipe with `section.key=value` overrides. Raises InputError."""
        values = self.model_dump(mode="json", exclude_unset=True)
        return self._checked(values, overrides, {}, "recipe")

    def dump(self) -> str:
        """YAML with defaults written out; `parse(dump()).dump()` is the same text."""
        values = self.model_dump(mode="json")
        values["training"] |= {"lr": self.lr, "head_lr": self.head_lr}
        values["data"] = self.data.dump()
        for key in ("allocation", "trackers"):
            if not values[key]:
                del values[key]
        return yaml.dump(values, Dumper=Quoting, sort_keys=False, allow_unicode=True)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of a recipe file, with the options of every structure."""
        schema = cls.model_json_schema()
        add_methods(schema["properties"])
        return schema


def add_methods(properties: dict[str, Any]) -> None:
    """Write the methods of every axis into the JSON Schema of a section that chooses them."""
    properties["structure"]["oneOf"] = method_schemas(STRUCTURES)
    del properties["allocation"]["type"]
    properties["allocation"]["oneOf"] = [{"type": "null"}, *method_schemas(ALLOCATIONS)]


def method_schemas(known: Mapping[str, type[Method]]) -> list[dict[str, Any]]:
    """JSON Schemas of all methods of an axis, options included."""
    choices = []
    for kind, method in sorted(known.items()):
        options = TypeAdapter(method).json_schema()
        options["properties"] = {"kind": {"const": kind}, **options["properties"]}
        choices.append({**options, "required": ["kind"], "additionalProperties": False})
    return choices
