"""Which tests run when: three tiers, each a part of the next.

quick  (`make check`)  what bears no mark: each value of each axis once, on its cheapest host
test   (`make test`)   and what is marked `slow`: real models, samples of generated tables
full   (`make full`)   and what is marked `full`: whole tables, every kill, long fuzzing
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest

TIERS = {"quick": ("slow", "full"), "test": ("full",), "full": ()}  # marks that each leaves out


def left_out(marks: Iterable[str], tier: str) -> bool:
    """Whether a test with these marks is not part of the tier.

    >>> left_out(["slow"], "quick"), left_out(["slow"], "test"), left_out(["full"], "test")
    (True, False, True)
    """
    return bool(set(marks) & set(TIERS[tier]))


def drawn(name: str, share: float) -> bool:
    """Whether a name falls into a share of all names; the same on every machine, every time.

    >>> [name for name in ("lora", "lsr", "dora", "hira", "oft", "boft") if drawn(name, 0.5)]
    ['lora', 'lsr']
    """
    return zlib.crc32(name.encode()) < share * 2**32


def sampled(
    cases: Iterable[Any],
    quick: float,
    test: float = 1.0,
    name: Callable[[Any], str] = str,
    salt: str = "",
    least: int = 1,
) -> list[Any]:
    """A generated table as parameters: a share of it is quick, a larger one in `test`, all of it
    in `full`. `name` gives each case its id, by whose hash it is drawn; `salt` (of the test) draws
    others. The first `least` cases are always quick: no table is without one.

    >>> [[m.name for m in p.marks] for p in sampled(["a", "b", "c", "d"], 0.3, 0.5)]
    [[], ['slow'], [], ['full']]
    """
    made = []
    for place, case in enumerate(cases):
        called = name(case)
        if place < least or drawn(salt + called, quick):
            marks = []
        else:
            marks = [pytest.mark.slow if drawn(salt + called, test) else pytest.mark.full]
        made.append(pytest.param(case, id=called, marks=marks))
    return made
