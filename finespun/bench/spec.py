"""A bench file: what all members share, the members, learning rates, seeds, and how to search."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from finespun.contract import Structure
from finespun.errors import InputError
from finespun.methods.axes import AXES
from finespun.recipes.axes import Chosen
from finespun.recipes.recipe import Recipe
from finespun.recipes.yaml import Document, Section, explain

FEWEST_LRS = 3
MOST_POWER = 4


class Grid(Section):
    """Rates from `low` to `high` with equal ratios."""

    low: float = Field(gt=0)
    high: float = Field(gt=0)
    count: int = Field(ge=FEWEST_LRS)


def read_rates(value: Any) -> tuple[float, ...]:
    """Increasing learning rates, from a list or from `{low, high, count}`; three digits each.

    Raises InputError where fewer than three different ones are left: with two, each is an edge.
    """
    if isinstance(value, Mapping):
        try:
            grid = Grid.model_validate(value)
        except ValidationError as error:
            raise InputError(explain(error, Grid, {}, "grid")) from error
        ratio = (grid.high / grid.low) ** (1 / (grid.count - 1))
        value = [grid.low * ratio**i for i in range(grid.count)]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{value!r} is neither a list of learning rates nor low, high and count")
    for lr in value:
        if isinstance(lr, bool) or not isinstance(lr, int | float) or lr <= 0:
            raise InputError(
                f"{lr!r} is no learning rate; it is a number above 0, for example 1e-3"
            )
    lrs = tuple(sorted({rounded(lr) for lr in value}))
    if len(lrs) < FEWEST_LRS:
        raise InputError(
            f"{len(lrs)} learning rates are too few: the best must have a neighbour on both sides; "
            f"try {', '.join(f'{lrs[0] * 3**i:.3g}' for i in (-1, 0, 1))}"
            if lrs
            else "no learning rates; try [3e-4, 1e-3, 3e-3, 1e-2]"
        )
    return lrs


def rounded(lr: float) -> float:
    """Three digits, so that a learning rate prints as what it is."""
    return float(f"{lr:.3g}")


_LIST = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}}
LearningRates = Annotated[
    tuple[float, ...],
    BeforeValidator(read_rates),
    WithJsonSchema({"anyOf": [_LIST, Grid.model_json_schema()]}),
]


class Member(Chosen):
    """A value on each axis to compare, at one size or at several.

    `targets: []` and nothing else is the frozen model with its head trained.
    """

    num_parameters: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="budgets of trained parameters; options that are not given are fitted to each; "
        "not beside an allocation",
    )
    name: str | None = Field(None, min_length=1, description="null: made from the options")
    targets: str | tuple[str, ...] | None = Field(None, description="null: the recipe's")
    lrs: LearningRates | None = Field(None, description="null: the bench's")
    lr: float | None = Field(None, gt=0, description="known from elsewhere; no search")
    lr_of: str | None = Field(
        None, description="a member with an lr or a search, whose lr is taken; no search"
    )
    lr_power: float = Field(
        0.0,
        ge=-MOST_POWER,
        le=MOST_POWER,
        description="p: the lr of `lr_of` is multiplied by (its parameters / these)^p; "
        "parameters are those trained in the layers, which without an allocation are known before",
    )
    _given: frozenset[str] = PrivateAttr(frozenset())

    @model_validator(mode="wrap")
    @classmethod
    def _note_options(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(values, Member):
            return handler(values)
        if not isinstance(values, Mapping):
            raise InputError(f"{values!r} needs a structure, for example structure: {{kind: lora}}")
        member = handler(values)
        taken = [key for key in (*AXES, "num_parameters") if key in values]
        if member.targets == () and taken:
            raise InputError(f"targets: [] trains the head alone, without {taken[0]}")
        if member.targets != () and "structure" not in values:
            raise InputError("structure is missing; targets: [] would train the head alone")
        if member.num_parameters and member.allocation is not None:
            raise InputError(
                f"num_parameters = {list(member.num_parameters)} beside an allocation: how many it "
                "leaves is known after the run only; give the structure's options instead"
            )
        given = [k for k in ("lr", "lrs", "lr_of") if getattr(member, k) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other; leave one in")
        if member.lr_of is None and "lr_power" in values:
            raise InputError("lr_power needs lr_of, the member whose learning rate it scales")
        options = values.get("structure")
        if isinstance(options, Mapping):
            aliases = type(member.structure).aliases
            member._given = frozenset(aliases.get(key, key) for key in options)
        return member

    @property
    def given(self) -> frozenset[str]:
        """Names of the structure's options that the file sets."""
        return self._given


def read_members(value: Any) -> tuple[Member, ...]:
    """Members from a list, each error led by its place in it."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError("is a list of members, for example - structure: {kind: lora, rank: 8}")
    members = []
    for place, item in enumerate(value, start=1):
        if isinstance(item, Member):
            members.append(item)
            continue
        try:
            members.append(Member.model_validate(item))
        except ValidationError as error:
            raise InputError(explain(error, Member, {}, f"member {place}")) from error
    return tuple(members)


class Search(Section):
    """How the learning rate of each member is found: successive halving on one seed.

    Each one trains for `epochs[0]` epochs, the best share `keep` for `epochs[1]`, and so on; the
    survivors, and then the neighbours of the best, for the recipe's own number. What decides is
    the metric on a share `rows` of the training rows, which these runs leave out: rows held out
    for the result are never looked at.
    """

    seed: int = Field(0, ge=0)
    epochs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    keep: float = Field(0.5, gt=0, lt=1)
    rows: float = Field(0.2, gt=0, lt=1)


def keys_of(section: Any) -> Mapping[str, Any]:
    """What a section sets, whether it was read already or not."""
    if isinstance(section, Section):
        return {key: getattr(section, key) for key in section.model_fields_set}
    return section if isinstance(section, Mapping) else {}


class BenchSpec(Document):
    """A comparison, whole. Every member is trained at its own best learning rate with every seed.

    A seed sets the head's start, the structure's draw, the order of rows and dropout.
    """

    noun: ClassVar[str] = "bench file"

    recipe: Recipe = Field(description="what all members share")
    members: Annotated[tuple[Member, ...], BeforeValidator(read_members)]
    lrs: LearningRates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    search: Search = Search()
    extend: bool = Field(
        True, description="a best learning rate at an edge of its grid widens the grid"
    )
    metric: str | None = Field(None, description="null: accuracy for classes, pearson for numbers")
    output: str = Field("out/bench", min_length=1, description="the folder that the bench writes")

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        # before the recipe is read: what is not its own should not be judged there
        recipe = keys_of(values).get("recipe")
        sections = [(recipe, key) for key in (*AXES, "output")]
        for section, key in (*sections, (keys_of(recipe).get("training"), "lr")):
            if key in keys_of(section):
                other = {"output": "output", "lr": "lrs"}.get(key, "members")
                raise InputError(f"recipe must not set {key}; a bench has {other} of its own")
        return values

    @model_validator(mode="after")
    def _agree(self) -> Self:
        recipe = self.recipe
        if recipe.trackers:
            raise InputError("recipe must not set trackers: a bench keeps its trials itself")
        rungs = (*self.search.epochs, recipe.training.epochs)
        if list(rungs) != sorted(set(rungs)):
            raise InputError(
                f"search.epochs = {list(self.search.epochs)} must rise and stay below the "
                f"{recipe.training.epochs} epochs of the recipe"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds = {list(self.seeds)} repeats a seed")
        return self

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of a bench file, with the options of every method; its recipe has no keys
        that the bench has of its own."""
        schema = cls.model_json_schema()
        parts = schema["$defs"]
        for key in (*AXES, "output", "trackers"):
            del parts["Recipe"]["properties"][key]
        del parts["Training"]["properties"]["lr"]
        return schema

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs of every stage of the search, the recipe's own number last."""
        return (*self.search.epochs, self.recipe.training.epochs)


def describe(structure: Structure) -> str:
    """A short name: the kind and every option that is not its default, sizes first.

    >>> from finespun.methods.structures import LSR
    >>> describe(LSR(rank=4, separation_rank=16))
    'LSR r=4 s=16'
    """
    sizes = {"rank": "r", "separation_rank": "s"}
    title = {"lora": "LoRA", "lsr": "LSR"}.get(structure.kind, structure.kind)
    parts = [
        f"{short}={getattr(structure, n)}" for n, short in sizes.items() if hasattr(structure, n)
    ]
    for field in dataclasses.fields(structure):
        value = getattr(structure, field.name)
        if field.name not in (*sizes, "seed") and value != field.default:
            parts.append(f"{field.name}={value}")
    return " ".join([title, *parts])
