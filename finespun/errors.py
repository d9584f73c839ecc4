"""Every error that Finespun raises on purpose.

FinespunError
├── InputError          a value, shape, name or option that cannot work   (exit code 2)
│   ├── TargetError     no such layer, or a layer that cannot be adapted
│   └── PlanError       a plan or structure that does not fit this model
├── FileError           a file that is missing, damaged or ill-shaped     (exit code 3)
│   ├── BaseMismatch    an adapter made for another base model
│   └── StrictError     what is unknown in a file, and may be passed over
├── StateError          a call that the present state forbids (merged, not active, ...)
└── TrainingError       training that cannot go on (NaN loss, nothing moved)   (exit code 4)
"""

import difflib
from collections.abc import Iterable


class FinespunError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(FinespunError, ValueError):
    """A value, shape, name or option that cannot work."""

    exit_code = 2


class TargetError(InputError):
    """A target that names no layer, or a layer that cannot be adapted."""


class PlanError(InputError):
    """A plan or a structure that does not fit this model."""


class FileError(FinespunError):
    """A file that is missing, damaged or ill-shaped."""

    exit_code = 3


class BaseMismatch(FileError):
    """An adapter that was made for another base model."""


class StrictError(FileError):
    """Something in a file that is unknown, or was changed since, and may be passed over."""


class StateError(FinespunError, RuntimeError):
    """A call that the present state forbids."""


class TrainingError(FinespunError, RuntimeError):
    """Training that cannot go on."""

    exit_code = 4


def an(noun: str) -> str:
    """A noun with its indefinite article.

    >>> an("embedding"), an("linear layer")
    ('an embedding', 'a linear layer')
    """
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """A phrase that names the closest valid spellings, for the end of an error message.

    >>> nearest("qurey", ["query", "value"])
    "nearest: 'query'"
    """
    known = sorted(set(map(str, names)))
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(map(repr, close))
    shown = ", ".join(map(repr, known[:12])) + (", ..." if len(known) > 12 else "")
    return f"known: {shown}" if known else "there are none"
