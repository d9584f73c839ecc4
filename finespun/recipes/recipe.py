"""A recipe: the one typed description of a run, read from YAML, checked before anything is loaded.

Every key can be overridden as `section.key=value`, with the value in YAML. An unknown key or an
impossible value is an InputError that names the key, the line, the value and what would work.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from finespun.errors import InputError
from finespun.methods.axes import AXES
from finespun.recipes.axes import Chosen
from finespun.recipes.data import Data
from finespun.recipes.training import HEAD_LR, Training
from finespun.recipes.yaml import Document, Quoting


class Recipe(Chosen, Document):
    """A run, whole: the same recipe gives the same adapter on the same machine and threads."""

    model: str = Field(description="minilm-l6, minilm-l3, smollm2-135m, a folder or a hub model")
    data: Data
    targets: Annotated[str, Field(min_length=1)] | tuple[str, ...] = Field(
        "all-linear", description="layers by name or suffix, a regex, all-linear, or [] for none"
    )
    train_modules: tuple[str, ...] | None = Field(
        None, description="other modules to train; null: the untrained head"
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
        given = self.training.head_lr
        if given is None:
            given = HEAD_LR if self.train_modules is None else "lr"
        return self.lr if given == "lr" else given

    def changed(self, overrides: Sequence[str]) -> Self:
        """The same recipe with `section.key=value` overrides. Raises InputError."""
        values = self.model_dump(mode="json", exclude_unset=True)
        return self._checked(values, overrides, {}, "recipe")

    def dump(self) -> str:
        """YAML with defaults written out; `parse(dump()).dump()` is the same text."""
        first = ("model", "data")
        values = self.model_dump(mode="json", exclude=set(AXES) - set(self.values))
        values = {**{key: values[key] for key in first}, **values}
        values["training"] |= {"lr": self.lr, "head_lr": self.head_lr}
        values["data"] = self.data.dump()
        if not self.trackers:
            del values["trackers"]
        return yaml.dump(values, Dumper=Quoting, sort_keys=False, allow_unicode=True)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of a recipe file, with the options of every method."""
        return cls.model_json_schema()
