"""What is learned: a task reads examples, makes batches, takes the loss, measures and answers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from torch import Tensor

from finespun.contract.method import Method, registering
from finespun.models import Loaded

Batch = dict[str, Tensor]
IGNORED = -100  # the label of a token that no loss is taken of


@dataclass(frozen=True)
class Source:
    """Where examples come from: built-in data by name, or a table and perhaps a second one to hold
    out; else `test_share` of the first is held out. `seed` draws which; `train_rows` and
    `test_rows` keep the first so many of either."""

    builtin: str | None = None
    file: str | None = None
    test_file: str | None = None
    test_share: float = 0.2
    seed: int = 0
    train_rows: int | None = None
    test_rows: int | None = None


@dataclass(frozen=True)
class Limits:
    """The sizes of a run: tokens of an example, whether a batch is packed into one row without
    padding, and examples in a batch that is measured."""

    max_length: int
    pack: bool = False
    eval_batch_size: int = 64


class Examples(Protocol):
    """Examples as a task reads them, held as columns or as a list."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Self:
        """The examples chosen, in the order given."""
        ...


E = TypeVar("E", bound=Examples)


@dataclass(frozen=True)
class Split(Generic[E]):
    """Examples to train on and examples held out. `read` counts those of all files, `repeated`
    those dropped because they were there already, `unused` those that the source left over."""

    train: E
    test: E
    read: int
    repeated: int = 0
    unused: int = 0

    def limited(self, source: Source) -> "Split[E]":
        """The first `train_rows` and `test_rows` of the parts; the others are unused."""
        train = self.train.take(range(min(len(self.train), source.train_rows or self.read)))
        test = self.test.take(range(min(len(self.test), source.test_rows or self.read)))
        left = len(self.train) + len(self.test) - len(train) - len(test)
        return Split(train, test, self.read, self.repeated, self.unused + left)

    @property
    def report(self) -> str:
        """One line that says where every example went."""
        parts = [f"{len(self.train)} to train on", f"{len(self.test)} held out"]
        parts += [f"{self.repeated} dropped as repeated"] if self.repeated else []
        parts += [f"{self.unused} not used"] if self.unused else []
        return f"{self.read} rows read: {', '.join(parts)}"


@dataclass(frozen=True)
class Encoded(ABC):
    """Examples as the model takes them, not padded; `cut` counts those that lost a part because
    they were longer than the limits allow."""

    limits: Limits
    cut: int

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """The size of every example, after cutting: tokens, or 1 where there are none."""

    @property
    @abstractmethod
    def content(self) -> Any:
        """What the examples are to the model, as JSON values, in order."""

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Self:
        """The examples `indices` alone."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def packed(self) -> bool:
        """Whether a batch is one long row."""
        return False

    def padded(self, indices: Sequence[int]) -> int:
        """The size of a batch of these examples, padding included."""
        lengths = self.lengths
        chosen = [lengths[i] for i in indices]
        return sum(chosen) if self.packed else len(chosen) * max(chosen)

    @property
    def key(self) -> str:
        """A hash of what is trained on: equal examples in equal order, and only those, agree."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    @property
    def report(self) -> str:
        """One line that says how many examples were cut."""
        share = 100 * self.cut / max(len(self), 1)
        most = self.limits.max_length
        return f"{self.cut} of {len(self)} rows ({share:.1f} %) cut at {most} tokens"


C = TypeVar("C", bound=Encoded)


@dataclass(frozen=True)
class Answer:
    """What a trained model says about one input: the likeliest `label` with the `probabilities` of
    all; a `value`; or a label alone, where it is words of a language model's own."""

    text: str
    value: float | None = None
    label: str | None = None
    probabilities: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task(Method, Generic[E, C]):
    """What is learned, with its options; subclass it beside its `Encoded`.

    `takes` says which models it trains. `metrics` may rank runs and rise as they get better, `best`
    being the first choice; `falls` is the metric that decides between equals and falls. `adds_up`:
    the loss of a batch is the mean of its examples' losses, weighted by `weight`. `packs`: a batch
    can be one row without padding.
    """

    takes: ClassVar[Literal["classifier", "causal"]]
    best: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    falls: ClassVar[str]
    adds_up: ClassVar[bool] = True
    packs: ClassVar[bool] = False

    def record(self) -> dict[str, Any]:
        """The task as JSON values, as the adapter's lineage keeps it; `task_of` restores it."""
        return {"kind": self.kind, **self.options()}

    def settled(self, examples: E) -> Self:
        """The same task with what the examples to train on decided: `load` needs no more."""
        return self

    # --- data ------------------------------------------------------------------------------------
    def read(self, source: Source) -> Split[E]:
        """Examples to train on and held out. Raises InputError naming rows that cannot be used,
        FileError for files."""
        raise NotImplementedError(f"{type(self).__name__} must say how it reads data")

    def read_labelled(self, file: str | Path) -> E:
        """All examples of another table with the same columns, for measuring."""
        raise NotImplementedError(f"{type(self).__name__} must say how it reads a table")

    def read_inputs(self, file: str | Path) -> E:
        """What a table or a text file asks, labels not looked at."""
        raise NotImplementedError(f"{type(self).__name__} must say how it reads inputs")

    def inputs(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> E:
        """What is asked, given as texts. Raises InputError for no texts and blank ones."""
        raise NotImplementedError(f"{type(self).__name__} must say what can be asked")

    def held_out(self, examples: E, share: float, seed: int) -> tuple[E, E]:
        """(the rest, the share held out), drawn by `seed`."""
        raise NotImplementedError(f"{type(self).__name__} must say how examples are divided")

    # --- model -----------------------------------------------------------------------------------
    def load(self, model: str, seed: int) -> Loaded:
        """The model by name or folder, of the class that this task trains; `seed` draws what starts
        untrained."""
        raise NotImplementedError(f"{type(self).__name__} must say what it loads")

    def encode(self, loaded: Loaded, examples: E, limits: Limits) -> C:
        """Examples as the model takes them."""
        raise NotImplementedError(f"{type(self).__name__} must say how it encodes")

    def collate(self, encoded: C, indices: Sequence[int]) -> Batch:
        """The examples `indices` as the tensors that the model takes."""
        raise NotImplementedError(f"{type(self).__name__} must say how it makes a batch")

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The mean loss of a batch, a tensor of no dimensions."""
        loss: Tensor = model(**batch).loss
        return loss

    def weight(self, batch: Batch) -> int:
        """How much a batch's mean loss counts beside others': its trained terms."""
        return len(batch["labels"])

    def count(self, batch: Batch) -> int:
        """Examples in a batch."""
        return len(batch["labels"])

    # --- what came of it -------------------------------------------------------------------------
    def groups(self, encoded: C) -> list[list[int]]:
        """The batches that `measure` takes, as indices."""
        return longest_first(encoded, encoded.limits.eval_batch_size)

    def measure(self, loaded: Loaded, encoded: C) -> dict[str, float]:
        """How good the model is on these examples, by name of the metric."""
        raise NotImplementedError(f"{type(self).__name__} must say how it measures")

    def answer(self, loaded: Loaded, inputs: E, limits: Limits) -> list[Answer]:
        """What the model says about each input."""
        raise NotImplementedError(f"{type(self).__name__} must say how it answers")

    def show(
        self, loaded: Loaded, encoded: C, disabled: Callable[[], AbstractContextManager[Any]]
    ) -> Iterator[str]:
        """Lines for a person to judge by, before and after: in `disabled()` the model is the base.
        None where metrics say it all."""
        yield from ()


TASKS: dict[str, type[Task[Any, Any]]] = {}
register = registering(TASKS, "a task")


def longest_first(encoded: Encoded, batch_size: int) -> list[list[int]]:
    """All examples in batches, the longest first, so that what needs most memory comes at once."""
    lengths = encoded.lengths
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
