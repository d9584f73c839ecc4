"""What an adapter did not get of what was asked for: layers that all-linear leaves out, ranks."""

import warnings
from collections import Counter
from collections.abc import Sequence

from torch import nn

from finespun.contract import Plan, Structure
from finespun.hosts.targets import inside, modules, unread


def left_out(model: nn.Module, adapted: Sequence[str], trained: Sequence[str]) -> tuple[str, ...]:
    """One phrase for each sort of module with weights that is neither adapted nor trained.

    Warns of weights that one would take for linear layers: those of a module whose fast path reads
    them without calling it, and matrices that stand as bare parameters (fused experts).
    """
    known = modules(model)
    mine = {name.partition(":")[0] for name in adapted}
    rest = {n: m for n, m in known.items() if n not in mine and not inside(n, trained)}
    lost = [n for n, m in rest.items() if isinstance(m, nn.Linear) and unread(model, known, n)]
    heads = [n for n, m in rest.items() if isinstance(m, nn.Linear) and n not in lost]
    bare = [
        f"{name}.{own}"
        for name, module in rest.items()
        for own, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() > 1 and own != "weight"
    ]
    kinds = Counter(
        type(m).__name__
        for m in rest.values()
        if m._parameters.get("weight") is not None and not isinstance(m, nn.Linear)
    )
    if lost or bare:
        warnings.warn(
            "all-linear leaves out what reads its weights without calling a layer: "
            f"{', '.join((lost + bare)[:4])}{', ...' if len(lost + bare) > 4 else ''}",
            stacklevel=4,
        )
    phrases = [f"{name} (the output head)" for name in heads]
    phrases += [f"{name} (not called as a layer)" for name in lost]
    phrases += [f"{name} (a bare parameter)" for name in bare]
    return (*phrases, *(f"{count} {kind}" for kind, count in sorted(kinds.items())))


def warn_of_smaller_ranks(structure: Structure, plan: Plan) -> None:
    """Warn of layers too small for the rank that was asked for, and of what they got."""
    asked = getattr(structure, "rank", 0)
    got = {
        site.name: rank
        for site in plan.sites
        if asked > min(site.out_features, site.in_features)
        and (rank := plan.choices.get(site.name, {}).get("rank", asked)) < asked
    }
    if got:
        shown = ", ".join(f"{name} gets {rank}" for name, rank in list(got.items())[:4])
        warnings.warn(
            f"rank={asked} is more than {len(got)} of {len(plan.sites)} layers hold: {shown}"
            + (", ..." if len(got) > 4 else ""),
            stacklevel=4,
        )
