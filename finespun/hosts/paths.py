"""Which way an update is multiplied: one table, of which the first row that fits wins.

A row holds where all its columns hold and none of its `unless`. Fixed columns follow from the
classes of the host and of the update, so that the rows that can still fit are known beforehand; all
other columns are read at every call. `choose` is a pure function of the two: a path is a word, and
nothing on a layer remembers it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from finespun.contract import Delta

Path = Literal[
    "fused", "operators", "around", "refused", "forward", "product", "factors", "through", "dense"
]
Line = tuple[int, int, Path]
_GLOBAL = nn.modules.module

# Fixed columns, then those that are read at every call.
LINEAR, FEATURES, SLICE, FACTORS, THROUGH, PRODUCT = (1 << i for i in range(6))
ALONE, PLAIN, ORDINARY, WATCHED, DROPS, UNIT, GAIN, START, MERGED, CHEAPER = (
    1 << i for i in range(6, 16)
)
FIXED = LINEAR | FEATURES | SLICE | FACTORS | THROUGH | PRODUCT

COLUMNS: Mapping[int, tuple[str, str]] = {
    LINEAR: ("linear", "the layer is an `nn.Linear`, or of a subclass, stored in floats"),
    FEATURES: ("features", "the last dimension of x and of y holds features"),
    SLICE: ("slice", "the update goes to some of the layer's outputs"),
    FACTORS: ("factors", "the update has factors A and B (`low_rank`)"),
    THROUGH: ("through", "it has a way around the layer (`through`)"),
    PRODUCT: ("product", "it may have a cheaper way of its own (`product`, `direct`)"),
    ALONE: ("alone", "no other update acts, no rows are routed, nothing mixes"),
    PLAIN: ("plain", "the layer computes as `nn.Linear` does: no forward of its own"),
    ORDINARY: ("ordinary", "plain tensors of one dtype; no tracing, transform or autocast"),
    WATCHED: ("hooks", "hooks sit on the update, global ones included, or a forward of its own"),
    DROPS: ("dropout", "the update is in training mode and drops inputs"),
    UNIT: ("unit", "its strength is 1"),
    GAIN: ("gain", "a gain scales what reaches its parameters"),
    START: ("start", "it keeps an exact start"),
    MERGED: ("merged", "an adapter is merged into the weight"),
    CHEAPER: ("cheaper", "its own way costs less: rows of x, gate, start, formed factors; no gain"),
}


@dataclass(frozen=True)
class Row:
    """One row: the path that is taken where all columns of `where` and none of `unless` hold."""

    path: Path
    where: int
    unless: int
    about: str


TABLE = (
    Row(
        "fused",
        LINEAR | FACTORS | ALONE | PLAIN | ORDINARY,
        WATCHED | CHEAPER,
        "one kernel makes x Wᵀ + b + c·s·(x Aᵀ) Bᵀ and its backward",
    ),
    Row(
        "operators",
        LINEAR | FACTORS | ALONE | PLAIN,
        WATCHED | CHEAPER,
        "the same in PyTorch's own operators",
    ),
    Row(
        "around",
        FEATURES | THROUGH | ALONE | UNIT,
        SLICE | WATCHED | DROPS | GAIN | START | MERGED,
        "`through` makes the whole output",
    ),
    Row("refused", WATCHED, FEATURES, "a hook would see no features"),
    Row("refused", WATCHED | GAIN, 0, "a hook may change what a gain has scaled"),
    Row("forward", WATCHED, 0, "the update is called as a module, its hooks with it"),
    Row("product", FACTORS | PRODUCT | FEATURES | CHEAPER, 0, "the update's own way to ΔW x"),
    Row("factors", FACTORS, 0, "two products, by A and by B"),
    Row(
        "through",
        FEATURES | THROUGH,
        SLICE | GAIN | START | MERGED,
        "`through`, less what the layer gives",
    ),
    Row("product", PRODUCT | FEATURES | CHEAPER, 0, "the update's own way to ΔW x"),
    Row("dense", 0, 0, "ΔW is formed, then one product"),
)


def resolve(fixed: int) -> tuple[Line, ...]:
    """The rows that may fit where the fixed columns are these: of every call's columns, which ones
    are looked at, what they must be, and the path; none stands behind one that always fits."""
    found: list[Line] = []
    for row in TABLE:
        if row.where & FIXED & ~fixed or row.unless & fixed:
            continue
        looked, wanted = (row.where | row.unless) & ~FIXED, row.where & ~FIXED
        found.append((looked, wanted, row.path))
        if not looked:
            break
    return tuple(found)


RESOLVED = tuple(resolve(fixed) for fixed in range(FIXED + 1))


def choose(fixed: int, now: int) -> Path:
    """The path of an update whose fixed columns are `fixed` and the others now are `now`."""
    for looked, wanted, path in RESOLVED[fixed]:
        if now & looked == wanted:
            return path
    return "dense"


def fixed_columns(host: type[Any], delta: Delta) -> int:
    """The fixed columns of an update, by what it wrote, on a host of this class."""
    written, own_choice = delta.written, type(delta).direct is not Delta.direct
    return sum(
        column
        for column, holds in (
            (LINEAR, host.fusable),
            (FEATURES, host.featured),
            (SLICE, host.sliced),
            (FACTORS, "low_rank" in written),
            (THROUGH, "through" in written),
            (PRODUCT, "product" in written or own_choice),
        )
        if holds
    )


def watched(module: nn.Module) -> bool:
    """Whether anybody watches the forward or backward, or has put another forward on the module."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or _GLOBAL._global_forward_hooks
        or _GLOBAL._global_forward_pre_hooks
        or _GLOBAL._global_backward_hooks
        or _GLOBAL._global_backward_pre_hooks
        or "forward" in own
    )


def table() -> str:
    """The table in Markdown, for the documentation."""
    lines = ["| path | where | unless | what happens |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row.path} | {_names(row.where)} | {_names(row.unless)} | {row.about} |"
        for row in TABLE
    ]
    return "\n".join(lines)


def columns() -> str:
    """The columns in Markdown, for the documentation."""
    lines = ["| column | read | holds where |", "| --- | --- | --- |"]
    for column, (name, about) in COLUMNS.items():
        read = "once, when inserted" if column & FIXED else "at every call"
        lines.append(f"| {name} | {read} | {about} |")
    return "\n".join(lines)


def _names(columns: int) -> str:
    return ", ".join(name for column, (name, _) in COLUMNS.items() if columns & column)
