"""Finding a member's learning rate: successive halving, then a look beyond the grid."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finespun.bench.spec import rounded

MOST_EXTENSIONS = 4

Score = tuple[float, float]
Measure = Callable[[float, int], Score | None]


@dataclass(frozen=True)
class Choice:
    """The best learning rate, None when all diverged; those tried; whether the best is
    the lowest or the highest of them, so that a better one may lie outside."""

    lr: float | None
    lrs: tuple[float, ...]
    at_edge: bool


def choose_lr(
    lrs: Sequence[float], rungs: Sequence[int], keep: float, extend: bool, measure: Measure
) -> Choice:
    """The learning rate with the highest score after `rungs[-1]` epochs.

    `measure(lr, epochs)` gives a score, larger is better, or None for a run that diverged. All
    learning rates run for `rungs[0]` epochs and the best ⌈keep·n⌉ go on to the next rung. Short
    runs favour high ones, so in the end the neighbours of the best one are trained whole too, until
    it beats both. With `extend`, a best one at an edge of the grid is followed outwards by the
    grid's ratio, at most `MOST_EXTENSIONS` times.
    """
    grid = sorted(lrs)
    alive: list[float] = list(grid)
    for epochs in rungs[:-1]:
        ran = {lr: s for lr in alive if (s := measure(lr, epochs)) is not None}
        best_first = sorted(ran, key=ran.__getitem__, reverse=True)
        alive = best_first[: math.ceil(keep * len(alive))]
    final = {lr: measure(lr, rungs[-1]) for lr in alive}
    extensions = 0
    while (best := _best(final)) is not None:
        if best in (grid[0], grid[-1]) and extend and extensions < MOST_EXTENSIONS:
            grid = sorted([*grid, _outside(grid, best)])
            extensions += 1
        place = grid.index(best)
        unknown = [lr for lr in grid[max(0, place - 1) : place + 2] if lr not in final]
        if not unknown:
            break
        final.update({lr: measure(lr, rungs[-1]) for lr in unknown})
    return Choice(best, tuple(grid), best in (grid[0], grid[-1]))


def _best(scores: dict[float, Score | None]) -> float | None:
    known = {lr: score for lr, score in scores.items() if score is not None}
    return max(known, key=lambda lr: known[lr]) if known else None


def _outside(grid: Sequence[float], edge: float) -> float:
    """One step beyond an edge of an increasing grid, by the ratio of the last two there."""
    inner = grid[1] if edge == grid[0] else grid[-2]
    return rounded(edge * edge / inner)
