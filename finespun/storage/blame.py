"""Values of a file's JSON, checked one by one, and errors that name the file they come from."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finespun.errors import FileError, InputError, StrictError

# what code meets where a file holds a value of another kind or size than it should
DAMAGED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Name the file in errors about its content."""
    try:
        yield
    except StrictError as error:
        raise StrictError(f"{path}: {error}") from error
    except (FileError, InputError) as error:
        raise FileError(f"{path}: {error}") from error
    except DAMAGED as error:
        raise FileError(f"{path} is damaged: {error!r}") from error


def an_object(value: Any, where: str) -> dict[str, Any]:
    """The value. Raises FileError unless it is an object."""
    return _checked(value, where, "an object", lambda v: isinstance(v, dict))


def a_list(value: Any, where: str, length: int | None = None) -> list[Any]:
    """The value. Raises FileError unless it is a list, of this length where one is given."""

    def fits(v: Any) -> bool:
        return isinstance(v, list) and length in (None, len(v))

    return _checked(value, where, "a list" if length is None else f"a list of {length}", fits)


def a_text(value: Any, where: str) -> str:
    """The value. Raises FileError unless it is a text of 1 to 1024 characters."""
    return _checked(value, where, "text", lambda v: isinstance(v, str) and 0 < len(v) <= 1024)


def finite_number(value: Any, where: str) -> float:
    """Raise FileError unless the value is a finite number."""

    def fits(v: Any) -> bool:
        return type(v) in (int, float) and abs(v) <= sys.float_info.max

    return float(_checked(value, where, "a finite number", fits))


def _checked(value: Any, where: str, what: str, fits: Callable[[Any], bool]) -> Any:
    if not fits(value):
        raise FileError(f"{where} must be {what}, got {str(value)[:80]!r}")
    return value
