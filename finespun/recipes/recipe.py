"""A recipe: the one typed description of a run, read from YAML, checked before anything is loaded.

Every key can be overridden as `section.key=value`, with the value in YAML. An unknown key or an
impossible value is an InputError that names the key, the line, the value and what would work.
"""

import re
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
from finespun.recipes.yaml import Document, Quoting, Section

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


TABLE = frozenset(("file", "test_file", "text", "pair", "label", "labels", "test_share"))
OPTIONAL = ("train_rows", "test_rows", "prompt", "answers", "chat")


class Data(Section):
    """What to learn from: a built-in task, or a table of one's own. Paths start where you are."""

    task: str | None = Field(None, description="a built-in task, for example trec")
    file: str | None = Field(None, description="a .csv, .tsv, .jsonl or .parquet file")
    test_file: str | None = Field(None, description="rows held out; else test_share of file")
    text: str = Field("text", description="the column with the text")
    pair: str | None = Field(None, description="the column with a second text, for pairs")
    label: str = Field("label", description="the column with the label")
    labels: Literal["classes", "numbers"] | None = Field(
        None, description="what labels are; null decides by their type"
    )
    test_share: float = Field(0.2, gt=0, lt=1, description="the share of rows held out")
    seed: int = Field(0, ge=0, description="chooses which rows are held out")
    train_rows: int | None = Field(None, ge=1, description="the first so many rows to train on")
    test_rows: int | None = Field(None, ge=1, description="the first so many rows held out")
    prompt: str | None = Field(
        None, description="text around {text}: a language model continues it with the label"
    )
    answers: dict[str, str] | None = Field(
        None, description="with prompt: the words that stand for each label; null: the label"
    )
    chat: bool = Field(False, description="with prompt: put it in the model's chat template")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.task is None) == (self.file is None):
            raise InputError("needs either a task or a file")
        named = [n for n in sorted(self.model_fields_set & TABLE) if getattr(self, n) is not None]
        if self.task is not None and named:
            raise InputError(f"the built-in task {self.task!r} takes no {named[0]!r}")
        return self

    @model_validator(mode="after")
    def _template(self) -> Self:
        if self.prompt is None:
            if self.answers is not None or self.chat:
                raise InputError("answers and chat belong to a prompt, and there is none")
            return self
        wanted = {"text"} if self.pair is None else {"text", "pair"}
        found = set(re.findall(r"\{(\w*)\}", self.prompt))
        if found != wanted:
            marks = " and ".join(f"{{{name}}}" for name in sorted(wanted, reverse=True))
            raise InputError(f"the prompt {self.prompt!r} must hold {marks} and no other braces")
        return self


class Training(Section):
    """How to learn: AdamW, its learning rate over time, batches, and what is repeated exactly."""

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1, description="batches to a step")
    pack: bool = Field(False, description="with a prompt: a batch as one row, without padding")
    lr: float | None = Field(None, gt=0, description="null: the structure's own, 1e-3 for most")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_share: float = Field(
        0.06, ge=0, lt=1, description="the share of steps in which lr rises"
    )
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: gradients are not clipped")
    max_length: int = Field(128, ge=1, description="tokens of a row; the rest is cut")
    seed: int = Field(0, ge=0, description="the head's start, the order of rows, dropout")
    threads: int | None = Field(None, ge=1, description="null: as many as torch takes")
    device: str | None = Field(None, description="cpu, cuda, ...; null: a GPU where there is one")
    eval_batch_size: int = Field(64, ge=1)
    checkpoint_every: int | None = Field(None, ge=1, description="steps; null: every epoch")


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
    def _packs_prompts(self) -> Self:
        if self.training.pack and self.data.prompt is None:
            raise InputError("training.pack is for language models: it needs data.prompt")
        return self

    @property
    def lr(self) -> float:
        """The learning rate: the recipe's, else the default of its structure."""
        if self.training.lr is not None:
            return self.training.lr
        return self.structure.default_lr

    def changed(self, overrides: Sequence[str]) -> Self:
        """The same recipe with `section.key=value` overrides. Raises InputError."""
        values = self.model_dump(mode="json", exclude_unset=True)
        return self._checked(values, overrides, {}, "recipe")

    def dump(self) -> str:
        """YAML with defaults written out; `parse(dump()).dump()` is the same text."""
        values = self.model_dump(mode="json")
        values["training"]["lr"] = self.lr
        for key in ("task",) if self.data.task is None else TABLE:
            del values["data"][key]
        for key in OPTIONAL:
            if not values["data"][key]:
                del values["data"][key]
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
