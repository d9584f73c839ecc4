"""What tasks on labelled texts and pairs of texts share: their columns, and how they are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from finespun.errors import InputError
from finespun.tasks.builtin import load_builtin
from finespun.tasks.tables import (
    Columns,
    LabelKind,
    LabelledTexts,
    load_split,
    read_examples,
    read_lines,
    read_texts,
    split,
)
from finespun.tasks.task import Source, Split, Task
from finespun.tasks.tokens import Tokens

T = TypeVar("T", bound=Tokens)


@dataclass(frozen=True, kw_only=True)
class TextTask(Task[LabelledTexts, T], Generic[T]):
    """A task on the columns `text`, `label` and, for pairs, `pair` of a table; `labels` says what a
    label is. `free`: held-out rows may have labels that no row to train on has."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"

    labels: ClassVar[LabelKind]
    free: ClassVar[bool] = False

    @property
    def known(self) -> tuple[str, ...] | None:
        """The classes, where labels are classes and they are settled."""
        return None

    @property
    def columns(self) -> Columns:
        """Where a table holds what is read."""
        return Columns(self.text, self.label, self.pair)

    def read(self, source: Source) -> Split[LabelledTexts]:
        if source.builtin is not None:
            if self.labels == "numbers":
                raise InputError(
                    f"the labels of {source.builtin!r} are classes; try task: classify"
                )
            return load_builtin(source.builtin, source.seed).limited(source)
        found = load_split(
            str(source.file),
            source.test_file,
            self.columns,
            self.labels,
            source.test_share,
            source.seed,
            self.free,
        )
        return found.limited(source)

    def read_labelled(self, file: str | Path) -> LabelledTexts:
        return read_examples(file, self.columns, self.labels, self.known)

    def read_inputs(self, file: str | Path) -> LabelledTexts:
        if Path(file).suffix == ".txt":
            return self.inputs(read_lines(file))
        return self.inputs(*read_texts(file, self.columns))

    def inputs(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> LabelledTexts:
        if not texts:
            raise InputError("no texts to predict")
        for number, row in enumerate(zip(texts, pairs or texts, strict=False), start=1):
            if not all(part.strip() for part in row):
                raise InputError(f"text {number} of {len(texts)} is blank: leave it out")
        if (pairs is None) != (self.pair is None):
            raise InputError(
                "this adapter was trained on "
                + ("single texts" if self.pair is None else "pairs of texts")
            )
        second, labels = None if pairs is None else tuple(pairs), (0,) * len(texts)
        return LabelledTexts(tuple(texts), second, labels, self.known)

    def held_out(
        self, examples: LabelledTexts, share: float, seed: int
    ) -> tuple[LabelledTexts, LabelledTexts]:
        return split(examples, share, seed)
