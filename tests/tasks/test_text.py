"""Tokens, batches and an order that can be taken up again at any place."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finespun.errors import InputError, StateError
from finespun.tasks import Classify
from finespun.tasks.batches import Batches, Position
from finespun.tasks.tables import LabelledTexts
from finespun.tasks.task import Limits, longest_first
from finespun.tasks.tokens import Tokens, pad, tokenize


class LetterTokenizer:
    """One token a letter, 1 at both ends and between pairs: enough of a tokenizer for a test."""

    def num_special_tokens_to_add(self, pair: bool) -> int:
        return 3 if pair else 2

    def __call__(self, texts: list[str], pairs: list[str] | None = None, **options: Any) -> Any:
        limit = options.get("max_length", 10**6)
        rows = [
            [*text, *(["", *pair] if pair is not None else [])]
            for text, pair in zip(texts, pairs or [None] * len(texts), strict=True)
        ]
        ids = [[1, *(ord(c) if c else 1 for c in row), 1][:limit] for row in rows]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

    def pad(self, rows: list[dict[str, list[int]]], return_tensors: str) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        return {
            name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in rows])
            for name in rows[0]
        }


TOKENIZER, TASK = LetterTokenizer(), Classify()


def tokens(lengths: list[int], max_length: int = 50) -> Tokens:
    rows = LabelledTexts(tuple("x" * n for n in lengths), None, tuple(range(len(lengths))), None)
    return tokenize(TOKENIZER, rows, Limits(max_length))


def taken(batches: Batches) -> list[int]:
    return [int(label) for batch in batches.epoch() for label in batch["labels"]]


def test_long_rows_are_cut_and_counted() -> None:
    got = tokens([3, 8, 9, 20], max_length=10)
    assert (got.cut, got.lengths) == (2, [5, 10, 10, 10])
    assert got.report == "2 of 4 rows (50.0 %) cut at 10 tokens"
    assert tokens([3, 8]).cut == 0


def test_pairs_reach_the_tokenizer() -> None:
    rows = LabelledTexts(("ab", "c"), ("d", "ef"), (0, 1), ("n", "y"))
    assert tokenize(TOKENIZER, rows, Limits(20)).lengths == [6, 6]
    with pytest.raises(InputError, match="at least 5"):
        tokenize(TOKENIZER, rows, Limits(4))


def test_a_batch_is_as_wide_as_its_longest_row() -> None:
    got = pad(tokens([1, 5, 9]), [0, 1])
    assert got["input_ids"].shape == (2, 7)
    assert got["attention_mask"].sum(1).tolist() == [3, 7]
    assert got["labels"].tolist() == [0.0, 1.0]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=90),
    size=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_every_row_comes_once_an_epoch(lengths: list[int], size: int, seed: int) -> None:
    batches = Batches(TASK, tokens(lengths), size, seed=seed)
    count = len(batches)
    order = batches.order(0)
    assert len(order) == count
    assert sum(len(batch) < size for batch in order) <= 1
    assert sorted(taken(batches)) == list(range(len(lengths)))
    assert batches.position == Position(1, 0)


@settings(deadline=None)
@given(size=st.integers(1, 7), stop=st.integers(0, 40), seed=st.integers(0, 3))
def test_restoring_goes_on_with_the_very_next_batch(size: int, stop: int, seed: int) -> None:
    data = tokens([1 + i % 7 for i in range(20)])
    whole = Batches(TASK, data, size, seed=seed)
    straight = [batch["labels"].tolist() for _ in range(3) for batch in whole.epoch()]

    first, seen = Batches(TASK, data, size, seed=seed), []
    place = first.position
    while len(seen) < stop and first.position.epoch < 3:
        for batch in first.epoch():
            seen.append(batch["labels"].tolist())
            place = first.position
            if len(seen) >= stop:
                break
    second = Batches(TASK, data, size, seed=seed)
    second.restore(place)
    while second.position.epoch < 3:
        seen += [batch["labels"].tolist() for batch in second.epoch()]
    assert seen == straight


def test_epochs_and_seeds_differ_and_repeat() -> None:
    data = tokens([5] * 64)
    batches = Batches(TASK, data, 4, seed=1)
    assert batches.order(0) != batches.order(1)
    assert batches.order(0) == Batches(TASK, data, 4, seed=1).order(0)
    assert batches.order(0) != Batches(TASK, data, 4, seed=2).order(0)


def test_bucketing_saves_padding() -> None:
    lengths = [1 + (7 * i) % 40 for i in range(320)]
    data = tokens(lengths)
    batches = Batches(TASK, data, 8)
    widths = sum(8 * max(data.lengths[i] for i in batch) for batch in batches.order(0))
    assert widths < 1.15 * sum(data.lengths)  # rows in file order would cost 1.7 times


def test_evaluation_takes_every_row_once_longest_first() -> None:
    data = tokens([2, 9, 4])
    assert longest_first(data, 2) == [[1, 2], [0]]


def test_impossible_places_and_sizes_are_refused() -> None:
    batches = Batches(TASK, tokens([1, 2, 3]), 2)
    with pytest.raises(StateError, match="2 batches an epoch"):
        batches.restore(Position(0, 3))
    with pytest.raises(InputError, match="batch_size = 0"):
        Batches(TASK, tokens([1]), 0)
