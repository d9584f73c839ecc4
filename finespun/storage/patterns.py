"""Regular expressions that come from a file: only those that are matched in bounded time."""

import re

from finespun.errors import FileError

STEPS = 10**8  # what the matcher may try for one path, by the estimate below
LONGEST = 1000


def check_pattern(pattern: str, path: str) -> None:
    """Raise FileError for an expression whose match against `path` could take without end: a
    repeated group that holds a repeat or a choice itself, or so many repeats k that
    len(path)^(k + 1) > 1e8; and for one that is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FileError(f"pattern {pattern[:80]!r} is no regular expression: {error}") from error
    repeats = _repeats(pattern)
    if repeats is None or len(pattern) > LONGEST or len(path) ** (repeats + 1) > STEPS:
        raise FileError(
            f"pattern {pattern[:80]!r} could take without end on {path[:80]!r}: name the layer, "
            "or repeat fewer things"
        )


def _repeats(pattern: str) -> int | None:
    """How many repeats there are; None where a repeated group holds a repeat or a choice."""
    count, varied = 0, [False]  # whether each open group holds a repeat or a choice
    text = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern, flags=re.DOTALL)
    for i, char in enumerate(text):
        repeated = text[i + 1 : i + 2] in ("*", "+", "{")
        if char == "(":
            varied.append(False)
        elif char == ")" and len(varied) > 1:
            inner = varied.pop()
            if inner and repeated:
                return None
            varied[-1] |= inner
        elif char == "|" or (char in "*+{" and i):
            varied[-1] = True
            count += char != "|"
    return count
