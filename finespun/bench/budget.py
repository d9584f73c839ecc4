"""Sizes that meet a budget of trained parameters: the closest from below that a structure has."""

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from math import log2

from finespun.contract import Site, Structure, Unmeasured
from finespun.errors import InputError
from finespun.methods.structures import LoRA

LEAST_SHARE = 0.5  # of a budget; a member that uses less is not a member at that budget
MOST_RANK = 64


def total(structure: Structure, sites: Sequence[Site]) -> int:
    """Trained parameters of a structure on these sites, shared ones included, in closed form."""
    return structure.total_parameters(structure.plan(sites, Unmeasured()))


def fit(
    structure: Structure, given: Collection[str], sites: Sequence[Site], budget: int
) -> Structure:
    """The structure with `rank` and `separation_rank` chosen, where they are not in `given`, so
    that its trained parameters come closest to `budget` from below.

    With a separation rank, ranks are powers of two, and a size that would need as many parameters
    as LoRA of the same rank is left out: it says no more than LoRA. Between equals the rank closest
    to the structure's own wins.

    Raises InputError when no size reaches the budget, with the nearest that the structure has.
    """
    ladders = _ladders(structure, given, sites)

    def count(choice: Structure) -> int:
        return total(choice, sites)

    least = min((ladder[0] for ladder in ladders), key=count)
    found = [choice for ladder in ladders for choice in _below(ladder, count, budget)]
    if not found:
        raise InputError(
            f"{structure.kind} cannot be written in {budget:,} parameters on these {len(sites)} "
            f"layers; the least is {count(least):,} ({_sizes(least)})"
        )
    best = max(found, key=lambda choice: (count(choice), -_distance(choice, structure)))
    if count(best) < LEAST_SHARE * budget:
        raise InputError(
            f"{structure.kind} uses {count(best):,} of {budget:,} parameters at most "
            f"({_sizes(best)}); give a budget near that"
            + (", or leave the rank out" if "rank" in given else "")
        )
    return best


def _below(
    ladder: Sequence[Structure], count: Callable[[Structure], int], budget: int
) -> Sequence[Structure]:
    """The choices of a ladder with the largest count within the budget; none if all exceed it."""
    end = bisect_right(ladder, budget, key=count)
    return ladder[bisect_left(ladder, count(ladder[end - 1]), key=count) : end] if end else ()


def _ladders(
    structure: Structure, given: Collection[str], sites: Sequence[Site]
) -> list[list[Structure]]:
    """Lists of growing choices; in each only one size changes. Raises InputError if there are
    none."""
    names = {field.name for field in dataclasses.fields(structure)}
    free = {"rank", "separation_rank"} & names - {*given}
    if not free or not sites:
        raise InputError(
            f"{structure.kind} has no free rank to fit to parameters; "
            + ("leave it out of the options" if "rank" in names else "give its options instead")
        )
    most = min(min(site.shape.in_features, site.shape.out_features) for site in sites)
    ranks = list(range(1, min(MOST_RANK, most) + 1))
    if "separation_rank" not in names:
        return [_ranked(structure, ranks, sites)]
    powers = [rank for rank in ranks if rank & (rank - 1) == 0]
    chosen = _ranked(structure, powers, sites) if "rank" in free else [structure]
    if "separation_rank" not in free:
        ladders = [[choice for choice in chosen if _worthwhile(choice, sites)]]
    else:
        ladders = [_terms(choice, most, sites) for choice in chosen]
    if not any(ladders):
        raise InputError(
            f"{structure.kind} has no size on these {len(sites)} layers with fewer parameters than "
            "LoRA of the same rank"
        )
    return [ladder for ladder in ladders if ladder]


def _ranked(structure: Structure, ranks: Sequence[int], sites: Sequence[Site]) -> list[Structure]:
    """The structure with every rank that it and these layers take, by growing parameters."""
    found = []
    for rank in ranks:
        try:
            choice = dataclasses.replace(structure, **{"rank": rank})
            total(choice, sites)
        except InputError:
            continue
        found.append(choice)
    if not found:
        total(structure, sites)  # says why
        raise InputError(f"{structure.kind} takes none of the ranks up to {ranks[-1]}")
    return sorted(found, key=lambda choice: total(choice, sites))


def _terms(structure: Structure, most: int, sites: Sequence[Site]) -> list[Structure]:
    """The structure with every separation rank that is worth its parameters."""
    terms = [
        dataclasses.replace(structure, **{"separation_rank": count}) for count in range(1, most + 1)
    ]
    return terms[: bisect_right(terms, False, key=lambda choice: not _worthwhile(choice, sites))]


def _worthwhile(structure: Structure, sites: Sequence[Site]) -> bool:
    return total(structure, sites) < total(LoRA(rank=_rank(structure)), sites)


def _rank(structure: Structure) -> int:
    return int(getattr(structure, "rank", 1))


def _distance(choice: Structure, structure: Structure) -> float:
    return abs(log2(_rank(choice) / _rank(structure)))


def _sizes(structure: Structure) -> str:
    names = [n for n in ("rank", "separation_rank") if hasattr(structure, n)]
    return ", ".join(f"{name}={getattr(structure, name)}" for name in names)
