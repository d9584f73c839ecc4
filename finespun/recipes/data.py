"""The section of a recipe that says what to learn from what."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from finespun.deprecated import warn
from finespun.errors import InputError, nearest
from finespun.recipes.yaml import Section
from finespun.tasks import TASKS, Task
from finespun.tasks.builtin import BUILTIN
from finespun.tasks.tables import guess_labels_of
from finespun.tasks.task import Source

TABLE = frozenset(("file", "test_file", "text", "pair", "label", "labels", "test_share"))
SELDOM = ("task", "train_rows", "test_rows", "prompt", "answers", "chat")
BY_LABELS = {"classes": "classify", "numbers": "regress"}


class Data(Section):
    """What to learn from: built-in data, or a table of one's own. Paths start where you are."""

    task: str | None = Field(
        None, description="what is learned: classify, regress or answer; null: by prompt and labels"
    )
    builtin: str | None = Field(None, description="built-in data, for example trec")
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

    @model_validator(mode="before")
    @classmethod
    def _built_in(cls, values: Any) -> Any:
        """`task: trec` of 0.1 is `builtin: trec`."""
        named = values.get("task") if isinstance(values, Mapping) else None
        if not isinstance(named, str) or named not in BUILTIN or "builtin" in values:
            return values
        warn(f"data.task: {named}", f"data.builtin: {named}")
        return {("builtin" if k == "task" else k): value for k, value in values.items()}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.builtin is None) == (self.file is None):
            raise InputError("needs either a file or builtin")
        named = [n for n in sorted(self.model_fields_set & TABLE) if getattr(self, n) is not None]
        if self.builtin is not None and named:
            raise InputError(f"the built-in data {self.builtin!r} takes no {named[0]!r}")
        return self

    @model_validator(mode="after")
    def _task(self) -> Self:
        if self.task is not None and self.task not in TASKS:
            raise InputError(f"task {self.task!r} is not known; {nearest(self.task, TASKS)}")
        if self.task is not None and self.task != (self._kind or self.task):
            raise InputError(f"task: {self.task} does not go with prompt and labels: leave it out")
        return self

    @model_validator(mode="after")
    def _template(self) -> Self:
        if self.prompt is None:
            if self.answers is not None or self.chat or self.task == "answer":
                raise InputError("answers and chat belong to a prompt, and there is none")
            return self
        if self.labels == "numbers":
            raise InputError("a language model answers with words: set data.labels to classes")
        wanted = {"text"} if self.pair is None else {"text", "pair"}
        found = set(re.findall(r"\{(\w*)\}", self.prompt))
        if found != wanted:
            marks = " and ".join(f"{{{name}}}" for name in sorted(wanted, reverse=True))
            raise InputError(f"the prompt {self.prompt!r} must hold {marks} and no other braces")
        return self

    @property
    def _kind(self) -> str | None:
        """The task's kind, where the file need not be looked at."""
        if self.prompt is not None:
            return "answer"
        if self.builtin is not None or self.labels is not None:
            return BY_LABELS[self.labels or "classes"]
        return self.task

    @property
    def packs(self) -> bool:
        """Whether the task can pack a batch into one row."""
        return self._kind is not None and TASKS[self._kind].packs

    @property
    def source(self) -> Source:
        """Where the rows are."""
        return Source(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Source)})

    def choose(self, record: Mapping[str, Any] | None = None) -> Task[Any, Any]:
        """The task that this section asks for, not settled; `record`, of a lineage, settles it.

        Raises InputError for a record that is none, FileError where the labels must be looked at
        and the file cannot be read.
        """
        kind = (record or {}).get("kind") or self._kind
        if kind is None:
            kind = BY_LABELS[guess_labels_of(str(self.file), self.label)]
        if kind not in TASKS:
            raise InputError(f"task {kind!r} is not known; {nearest(str(kind), TASKS)}")
        options = {f.name for f in dataclasses.fields(TASKS[kind])}
        own = {n: getattr(self, n) for n in options & type(self).model_fields.keys()}
        settled = {k: v for k, v in (record or {}).items() if k != "kind"}
        return TASKS[kind].from_options(**own | settled)

    def dump(self) -> dict[str, Any]:
        """Plain values with defaults written out; what is seldom used and unset is left out."""
        values = self.model_dump(mode="json")
        without = TABLE if self.builtin is not None else {"builtin"}
        unset = {key for key in SELDOM if not values[key]}
        return {key: value for key, value in values.items() if key not in without | unset}
