"""Sizes that meet a budget of trained numbers: the closest from below that a structure has."""

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from math import log2

from finespun.errors import InputError
from finespun.structures import LoRA, Site, Structure

LEAST_SHARE = 0.5  # of a budget; a member that uses less is not a member at that budget
MOST_RANK = 64


def total(structure: Structure, sites: Sequence[Site]) -> int:
    """Trained numbers of a structure on these sites, the shared ones included, in closed form."""
    return structure.total(structure.plan(sites))


def fit(
    structure: Structure, given: Collection[str], sites: Sequence[Site], budget: int
) -> Structure:
    """The structure with `rank` and `separation_rank` chosen, where they are not in `given`, so
    that its trained numbers come closest to `budget` from below.

    With a separation rank, ranks are powers of two, and a size that would need as many numbers as
    LoRA of the same rank is left out: it says no more than LoRA. Between equals the rank closest
    to the structure's own wins.

    Raises InputError when no size reaches the budget, with the nearest that the structure has.
    """
    ladders = _ladders(structure, given, sites)
    if not ladders:
        raise InputError(
            f"{structure.kind} has no free size to fit to {budget:,} numbers: leave out its rank"
            + (" or separation_rank" if hasattr(structure, "separation_rank") else "")
        )

    def count(choice: Structure) -> int:
        return total(choice, sites)

    least = min((ladder[0] for ladder in ladders), key=count)
    fitting = [_last_below(ladder, count, budget) for ladder in ladders]
    found = [choice for choice in fitting if choice is not None]
    if not found:
        raise InputError(
            f"{structure.kind} cannot be written in {budget:,} numbers on these {len(sites)} "
            f"layers; the least is {count(least):,} ({_sizes(least)})"
        )
    best = max(found, key=lambda choice: (count(choice), -_distance(choice, structure)))
    if count(best) < LEAST_SHARE * budget:
        raise InputError(
            f"{structure.kind} uses {count(best):,} of {budget:,} numbers at most "
            f"({_sizes(best)}); give a budget near that, or free its rank"
        )
    return best


def _last_below(
    ladder: Sequence[Structure], count: Callable[[Structure], int], budget: int
) -> Structure | None:
    place = bisect_right(ladder, budget, key=count)
    return ladder[place - 1] if place else None


def _ladders(
    structure: Structure, given: Collection[str], sites: Sequence[Site]
) -> list[list[Structure]]:
    """Lists of growing choices; in each only one size changes."""
    names = {field.name for field in dataclasses.fields(structure)}
    free = {"rank", "separation_rank"} & names - set(given)
    if not free or not sites:
        return []
    most = min(min(site.shape.in_features, site.shape.out_features) for site in sites)
    ranks = list(range(1, min(MOST_RANK, most) + 1))
    if "separation_rank" not in names:
        return [kept] if (kept := _lawful(structure, "rank", ranks)) else []
    powers = [rank for rank in ranks if rank & (rank - 1) == 0]
    if "separation_rank" not in free:
        kept = [s for s in _lawful(structure, "rank", powers) if _worthwhile(s, sites)]
        return [kept] if kept else []
    chosen = _lawful(structure, "rank", powers) if "rank" in free else [structure]
    ladders = []
    for choice in chosen:
        terms = _lawful(choice, "separation_rank", range(1, most + 1))
        place = bisect_right(terms, False, key=lambda s: not _worthwhile(s, sites))
        if place:
            ladders.append(terms[:place])
    return ladders


def _lawful(structure: Structure, name: str, values: Sequence[int]) -> list[Structure]:
    """The structure with every value that it accepts for one option."""
    found = []
    for value in values:
        try:
            found.append(dataclasses.replace(structure, **{name: value}))
        except InputError:
            continue
    return found


def _worthwhile(structure: Structure, sites: Sequence[Site]) -> bool:
    return total(structure, sites) < total(LoRA(rank=_rank(structure)), sites)


def _rank(structure: Structure) -> int:
    return int(getattr(structure, "rank", 1))


def _distance(choice: Structure, structure: Structure) -> float:
    return abs(log2(_rank(choice) / _rank(structure)))


def _sizes(structure: Structure) -> str:
    names = [n for n in ("rank", "separation_rank") if hasattr(structure, n)]
    return ", ".join(f"{name}={getattr(structure, name)}" for name in names)
