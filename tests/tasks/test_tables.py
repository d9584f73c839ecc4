"""Users' tables: what is read, what is refused, and how rows are held out."""

from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finespun.errors import FileError, InputError
from finespun.tasks.tables import (
    Columns,
    LabelledTexts,
    drop_duplicates,
    load_split,
    read_examples,
    split,
)

FRAME = pl.DataFrame({"text": ["a", "b, c", "d\ne", "f"], "label": ["x", "y", "x", "y"]})


def write(folder: Path, text: str, name: str = "data.csv") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def examples(labels: list[int], classes: int) -> LabelledTexts:
    texts = tuple(f"text {i}" for i in range(len(labels)))
    return LabelledTexts(texts, None, tuple(labels), tuple(map(str, range(classes))))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.ndjson", "t.parquet"])
def test_all_kinds_of_files_say_the_same(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith("parquet"):
        FRAME.write_parquet(file)
    elif name.endswith("json") or name.endswith("jsonl"):
        FRAME.write_ndjson(file)
    else:
        FRAME.write_csv(file, separator="\t" if name.endswith("tsv") else ",")
    read = read_examples(file)
    assert read == LabelledTexts(("a", "b, c", "d\ne", "f"), None, (0, 1, 0, 1), ("x", "y"))
    assert read.label_tensor().dtype == torch.int64


def test_whole_numbers_are_classes_in_order_of_size(tmp_path: Path) -> None:
    read = read_examples(write(tmp_path, "text,label\na,10\nb,9\nc,10\n"))
    assert (read.classes, read.labels) == (("9", "10"), (1, 0, 1))


def test_fractions_are_numbers_unless_told_otherwise(tmp_path: Path) -> None:
    file = write(tmp_path, "text,label\na,1.0\nb,2.5\n")
    read = read_examples(file)
    assert (read.classes, read.labels) == (None, (1.0, 2.5))
    assert read.label_tensor().dtype == torch.float32
    assert read_examples(file, labels="classes").classes == ("1", "2.5")


def test_many_whole_numbers_are_numbers(tmp_path: Path) -> None:
    rows = "".join(f"t{i},{i}\n" for i in range(51))
    assert read_examples(write(tmp_path, "text,label\n" + rows)).classes is None


def test_pairs_and_other_column_names(tmp_path: Path) -> None:
    file = write(tmp_path, "p,h,y\na,b,yes\nc,d,no\n")
    read = read_examples(file, Columns("p", "y", "h"))
    assert (read.texts, read.pairs, read.classes) == (("a", "c"), ("b", "d"), ("no", "yes"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("text,label\n", "has no rows"),
        ("txt,label\na,b\n", "no column 'text'; nearest: 'txt'"),
        ("text,label\na,1\nb,1\n", "all labels in 'label' are 1"),
        ("text,label\na,x\nb,\n", "1 rows without a label in 'label', the first is row 2"),
        ("text,label\na,0.5\nb,NaN\n", "1 rows without a label in 'label', the first is row 2"),
        ("text,label\n  ,x\nb,y\n", "1 rows without a text in 'text', the first is row 1"),
        ("text,label\na,x\nb,y,z,w\n", "cannot be read as csv"),
    ],
)
def test_bad_tables_are_refused_in_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises((FileError, InputError), match=says) as caught:
        read_examples(write(tmp_path, text))
    assert "data.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_and_infinities_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not numbers; try: labels: classes"):
        read_examples(write(tmp_path, "text,label\na,x\nb,y\n"), labels="numbers")
    with pytest.raises(InputError, match="not all finite"):
        read_examples(write(tmp_path, "text,label\na,1.5\nb,inf\n"))


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    write(tmp_path, "text,label\n", "reviews.csv")
    (tmp_path / "review").mkdir()
    with pytest.raises(FileError, match=r"no file '.*'; tables in '.*', nearest: 'reviews\.csv'$"):
        read_examples(tmp_path / "review.csv")
    with pytest.raises(FileError, match=r"no file '.*'; tables in '.*', known: 'reviews\.csv'$"):
        read_examples(tmp_path / "x")
    with pytest.raises(FileError, match=r"is a folder; tables in it, known: 'reviews\.csv'$"):
        read_examples(tmp_path)
    with pytest.raises(
        FileError, match=r"is a folder; no table lies in it: .* end in \.csv, \.tsv"
    ):
        read_examples(tmp_path / "review")
    with pytest.raises(FileError, match=r"there is no folder '.*nothing' either$"):
        read_examples(tmp_path / "nothing" / "x.csv")
    with pytest.raises(FileError, match=r"endings: \.csv, \.tsv"):
        read_examples(write(tmp_path, "x", "data.xlsx"))
    with pytest.raises(FileError, match="cannot be read as parquet"):
        read_examples(write(tmp_path, "x", "data.parquet"))


def test_a_test_file_keeps_the_training_classes(tmp_path: Path) -> None:
    train = write(tmp_path, "text,label\na,x\nb,y\nc,x\na,x\n", "train.csv")
    test = write(tmp_path, "text,label\nd,y\nc,x\nd,y\n", "test.csv")
    got = load_split(train, test)
    assert (got.train.texts, got.test.texts) == (("a", "b"), ("d", "c"))
    assert (got.test.labels, got.repeated) == ((1, 0), 3)  # a again, d again, c in both
    other = write(tmp_path, "text,label\nd,w\n", "other.csv")
    with pytest.raises(InputError, match="class 'w' that the training rows lack"):
        load_split(train, other)
    with pytest.raises(InputError, match="in the test file"):
        load_split(train, train)


def test_duplicates_keep_the_first_row() -> None:
    rows = LabelledTexts(("a", "b", "a"), ("p", "p", "q"), (0, 1, 1), ("n", "y"))
    assert drop_duplicates(rows) == (rows, 0)
    kept, dropped = drop_duplicates(LabelledTexts(("a", "b", "a"), None, (0, 1, 1), ("n", "y")))
    assert (kept.texts, kept.labels, dropped) == (("a", "b"), (0, 1), 1)


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=4, max_size=80),
    share=st.floats(0.1, 0.5),
    seed=st.integers(0, 5),
)
def test_a_split_is_a_partition_in_proportion(labels: list[int], share: float, seed: int) -> None:
    whole = examples(labels, 4)
    train, test = split(whole, share, seed)
    assert sorted(train.texts + test.texts) == sorted(whole.texts)
    assert len(train) > 0
    assert split(whole, share, seed) == (train, test)
    held, total = Counter(test.labels), Counter(labels)
    count = max(1, round(share * len(labels)))
    for label, number in held.items():
        assert abs(number - total[label] * count / len(labels)) <= 1
        assert label in train.labels


def test_the_seed_chooses_other_rows() -> None:
    whole = examples([0, 1] * 50, 2)
    assert split(whole, 0.2, 0)[1].texts != split(whole, 0.2, 1)[1].texts


def test_numbers_are_held_out_over_their_whole_range() -> None:
    whole = LabelledTexts(tuple(map(str, range(100))), None, tuple(map(float, range(100))), None)
    held = sorted(split(whole, 0.1)[1].labels)
    assert [int(value // 10) for value in held] == list(range(10))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        split(examples([0, 1], 2), share)


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(InputError, match="too few"):
        split(examples([0], 2))


def test_all_rows_to_mend_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text,label\n" + "a,x\nb,y\n,x\n" * 14)
    with pytest.raises(InputError, match=r"14 rows .* first is row 3: fill in or delete") as caught:
        read_examples(file)
    assert str(caught.value).endswith(": 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, ...")


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        ("cp1252", "byte 0xe9 in line 2), perhaps WINDOWS-1252: iconv -f WINDOWS-1252 -t UTF-8 x."),
        ("utf-16", "byte 0xff in line 1), perhaps UTF-16: iconv -f UTF-16 -t UTF-8 x."),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_another_encoding_is_recognised(
    tmp_path: Path, encoding: str, says: str, ending: str
) -> None:
    rows = {"csv": "text,label\ncaf\u00e9,x\nb,y\n", "tsv": "text\tlabel\ncaf\u00e9\tx\nb\ty\n"}
    text = rows.get(ending, '{"text": "a", "label": "x"}\n{"text": "caf\u00e9", "label": "y"}\n')
    file = tmp_path / f"x.{ending}"
    file.write_bytes(text.encode(encoding))
    with pytest.raises(FileError) as caught:
        read_examples(file)
    assert says + ending in str(caught.value)
