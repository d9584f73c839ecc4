"""Labelled texts from a user's own CSV, TSV, JSON-lines or Parquet file, checked and split."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from finespun.errors import FileError, InputError, nearest
from finespun.storage.blame import DAMAGED
from finespun.storage.memory_limit import SHARE, memory
from finespun.storage.safe_io import check_given, read_given
from finespun.tasks.task import Split

if TYPE_CHECKING:
    import polars as pl

LabelKind = Literal["classes", "numbers"]

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
MANY_CLASSES = 50
SHOWN = 10


@dataclass(frozen=True)
class LabelledTexts:
    """Labelled rows. With `classes`, a label is an index into it; without, a number to predict."""

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[int, ...] | tuple[float, ...]
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.texts)

    def label_tensor(self) -> Tensor:
        """Labels of shape (rows,): int64 class numbers, or float32 values."""
        kind = torch.float32 if self.classes is None else torch.int64
        return torch.tensor(self.labels, dtype=kind)

    def take(self, rows: Sequence[int]) -> "LabelledTexts":
        """The rows chosen, in the order given."""
        return LabelledTexts(
            tuple(self.texts[i] for i in rows),
            None if self.pairs is None else tuple(self.pairs[i] for i in rows),
            tuple(self.labels[i] for i in rows),
            self.classes,
        )


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold the text, its label and, for pairs, the second text."""

    text: str = "text"
    label: str = "label"
    pair: str | None = None


def read_table(path: str | Path) -> "pl.DataFrame":
    """Read a table by its ending: .csv, .tsv, .jsonl, .ndjson or .parquet.

    Raises FileError if it is missing, of another kind, unreadable or empty.
    """
    import polars as pl

    file = Path(path).expanduser()
    if not file.is_file():
        raise FileError(_no_table(file))
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise FileError(
            f"{str(path)!r} is no table that can be read; endings: {', '.join(ENDINGS)}"
        )
    check_given(file, memory() // SHARE)
    try:
        if ending == ".parquet":
            table = pl.read_parquet(file)
        elif ending in (".jsonl", ".ndjson"):
            table = pl.read_ndjson(file, infer_schema_length=None)
        else:
            separator = "\t" if ending == ".tsv" else ","
            table = pl.read_csv(file, separator=separator, infer_schema_length=None)
    except pl.exceptions.NoDataError as error:
        raise FileError(f"{str(path)!r} is empty") from error
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, *DAMAGED) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if ending != ".parquet":
            reason = _other_encoding(file) or reason
        raise FileError(f"{str(path)!r} cannot be read as {ending[1:]}: {reason}") from error
    if table.is_empty():
        raise FileError(f"{str(path)!r} has no rows")
    return table


def _no_table(file: Path) -> str:
    """What is wrong with the name of a file that is none, and which tables are near it."""
    folder = file if file.is_dir() else file.parent
    what = f"{str(file)!r} is a folder" if file.is_dir() else f"no file {str(file)!r}"
    if not folder.is_dir():
        return f"{what}; there is no folder {str(folder)!r} either"
    tables = [p.name for p in folder.iterdir() if p.suffix.lower() in ENDINGS]
    place = "it" if folder is file else repr(str(folder))
    if not tables:
        return f"{what}; no table lies in {place}: names of tables end in {', '.join(ENDINGS)}"
    return f"{what}; tables in {place}, {nearest(file.name, tables)}"


def read_examples(
    path: str | Path,
    columns: Columns = Columns(),
    labels: LabelKind | None = None,
    classes: tuple[str, ...] | None = None,
) -> LabelledTexts:
    """Read labelled texts. `labels` says what the label column holds; None decides by its type.

    Texts, booleans and whole numbers with at most 50 values are classes, other columns are
    numbers. `classes` fixes the classes (of a training file, for its test file).

    Raises FileError for the file, InputError for missing columns, texts or labels, and for a single
    class.
    """
    table = read_table(path)
    column = _plain_column(table, columns.label, path)
    texts, pairs = _text_columns(table, columns, path)
    missing = column.is_null() | (column.is_nan() if column.dtype.is_float() else False)
    _refuse(missing, "label", columns.label, path)
    if classes is None and (labels or guess_labels(column)) == "numbers":
        return LabelledTexts(texts, pairs, _numbers(column, path), None)
    names = [_class_name(value) for value in column]
    if classes is None:
        classes = _classes(column, path)
    elif unknown := sorted(set(names) - set(classes)):
        raise InputError(
            f"{str(path)!r} has the class {unknown[0]!r} that the training rows lack; "
            f"{nearest(unknown[0], classes)}"
        )
    index = {name: number for number, name in enumerate(classes)}
    return LabelledTexts(texts, pairs, tuple(index[name] for name in names), classes)


def read_texts(
    path: str | Path, columns: Columns = Columns()
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The texts of a table and, for pairs, the second texts; labels are not looked at.

    Raises FileError for the file, InputError for missing columns or texts.
    """
    return _text_columns(read_table(path), columns, path)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank. Raises FileError."""
    try:
        lines = read_given(Path(path), memory() // SHARE).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{str(path)!r} cannot be read: {error}") from error
    return [line for line in lines if line.strip()]


def guess_labels(column: "pl.Series") -> LabelKind:
    """Whether a label column holds classes or numbers, by its type and its number of values."""
    many = column.dtype.is_integer() and column.n_unique() > MANY_CLASSES
    return "numbers" if many or column.dtype.is_float() else "classes"


def guess_labels_of(path: str | Path, label: str) -> LabelKind:
    """`guess_labels` for a column of a table. Raises FileError and InputError as reading does."""
    return guess_labels(_column(read_table(path), label, path))


def load_split(
    train: str | Path,
    test: str | Path | None = None,
    columns: Columns = Columns(),
    labels: LabelKind | None = None,
    test_share: float = 0.2,
    seed: int = 0,
    free: bool = False,
) -> Split[LabelledTexts]:
    """Rows to train on and rows held out, from one file or two.

    With one file, `split` holds a share out. Rows that repeat a text are dropped, and training rows
    that a given test file repeats; the number is reported. `free`: held-out rows may have classes
    that no training row has (answers in words).
    """
    rows = read_examples(train, columns, labels)
    kept, dropped = drop_duplicates(rows)
    if test is None:
        return Split(*split(kept, test_share, seed, free), len(rows), dropped)
    kind: LabelKind = "numbers" if rows.classes is None else "classes"
    others = read_examples(test, columns, kind, None if free else rows.classes)
    held, again = drop_duplicates(others)
    if free:
        kept, held = _one_list(kept, held)
    seen = set(_keys(held))
    apart = [i for i, key in enumerate(_keys(kept)) if key not in seen]
    if not apart:
        raise InputError(f"every row of {str(train)!r} is in the test file {str(test)!r} too")
    repeated = dropped + again + len(kept) - len(apart)
    return Split(kept.take(apart), held, len(rows) + len(others), repeated)


def drop_duplicates(examples: LabelledTexts) -> tuple[LabelledTexts, int]:
    """The first row of every text (or pair of texts), and how many rows were dropped."""
    first = {key: i for i, key in reversed(list(enumerate(_keys(examples))))}
    rows = sorted(first.values())
    return examples.take(rows), len(examples) - len(rows)


def split(
    examples: LabelledTexts, test_share: float = 0.2, seed: int = 0, free: bool = False
) -> tuple[LabelledTexts, LabelledTexts]:
    """(train, test): rows shuffled by `seed`, sorted by label, and every (1/share)-th held out.

    So each class, or each range of values, is held out in proportion, to within a row; a class
    that would leave no row to train on stays in training unless `free`.

    Raises InputError for a share outside (0, 1) or too few rows.
    """
    if not 0 < test_share < 1:
        raise InputError(f"test_share = {test_share}; it lies between 0 and 1, for example 0.2")
    count = max(1, round(test_share * len(examples)))
    if len(examples) - count < 1:
        raise InputError(f"{len(examples)} rows are too few to hold some out")
    rows = list(range(len(examples)))
    random.Random(f"{seed}/split").shuffle(rows)
    rows.sort(key=examples.labels.__getitem__)
    held = {rows[math.floor((j + 0.5) * len(rows) / count)] for j in range(count)}
    if examples.classes is not None and not free:
        trained = {examples.labels[i] for i in rows if i not in held}
        held = {i for i in held if examples.labels[i] in trained}
    train = [i for i in range(len(examples)) if i not in held]
    return examples.take(train), examples.take(sorted(held))


def _one_list(a: LabelledTexts, b: LabelledTexts) -> tuple[LabelledTexts, LabelledTexts]:
    """The same rows with the classes of both."""
    names = tuple(sorted({*(a.classes or ()), *(b.classes or ())}))
    number = {name: i for i, name in enumerate(names)}

    def renamed(part: LabelledTexts) -> LabelledTexts:
        old = part.classes or ()
        labels = tuple(number[old[int(label)]] for label in part.labels)
        return LabelledTexts(part.texts, part.pairs, labels, names)

    return renamed(a), renamed(b)


def _keys(examples: LabelledTexts) -> list[tuple[str, str]]:
    return list(zip(examples.texts, examples.pairs or [""] * len(examples), strict=True))


def _text_columns(
    table: "pl.DataFrame", columns: Columns, path: str | Path
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    texts = _texts(table, columns.text, path)
    return texts, None if columns.pair is None else _texts(table, columns.pair, path)


def _column(table: "pl.DataFrame", name: str, path: str | Path) -> "pl.Series":
    if name not in table.columns:
        raise InputError(f"{str(path)!r} has no column {name!r}; {nearest(name, table.columns)}")
    return table[name]


def _plain_column(table: "pl.DataFrame", name: str, path: str | Path) -> "pl.Series":
    """A column of texts, numbers, booleans or dates. Raises InputError for lists and the like."""
    column = _column(table, name, path)
    if column.dtype.is_nested() or str(column.dtype) in ("Object", "Binary", "Unknown"):
        raise InputError(
            f"{str(path)!r}: {name!r} holds {column.dtype}, not one text or number a row"
        )
    return column


def _texts(table: "pl.DataFrame", name: str, path: str | Path) -> tuple[str, ...]:
    column = _plain_column(table, name, path).cast(str)
    _refuse(column.is_null() | (column.str.strip_chars() == ""), "text", name, path)
    return tuple(column)


def _refuse(missing: "pl.Series", what: str, name: str, path: str | Path) -> None:
    rows = [int(row) + 1 for row in missing.arg_true()]
    if not rows:
        return
    shown = ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")
    raise InputError(
        f"{str(path)!r} has {len(rows)} rows without a {what} in {name!r}, the first is row "
        f"{rows[0]}: fill in or delete these rows (counted without the heading): {shown}"
    )


def _other_encoding(file: Path) -> str | None:
    """What to do about a text file that is not UTF-8; None for one that is."""
    data = read_given(file, memory() // SHARE)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        likely = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        line = data.count(b"\n", 0, error.start) + 1
        return (
            f"it is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}), perhaps {likely}: "
            f"iconv -f {likely} -t UTF-8 {file.name} > utf8-{file.name}"
        )
    return None


def _numbers(column: "pl.Series", path: str | Path) -> tuple[float, ...]:
    if not column.dtype.is_numeric():
        raise InputError(
            f"{str(path)!r}: labels in {column.name!r} are {column.dtype}, not numbers; "
            "try: labels: classes"
        )
    values = tuple(float(value) for value in column)
    if not all(map(math.isfinite, values)):
        raise InputError(f"{str(path)!r}: labels in {column.name!r} are not all finite")
    return values


def _class_name(value: object) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole and isinstance(value, float) else str(value)


def _classes(column: "pl.Series", path: str | Path) -> tuple[str, ...]:
    counts = Counter(column)
    if len(counts) < 2:
        raise InputError(
            f"{str(path)!r}: all labels in {column.name!r} are {next(iter(counts))!r}; "
            "classification needs two classes or more"
        )
    return tuple(_class_name(value) for value in sorted(counts))
