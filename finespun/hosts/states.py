"""The states of an adapted model: what each call makes of it, and what is refused where, as tables.

A model is merged or not, and stands inside any number of `rows` and `disabled` blocks, which are a
stack. `check` looks at the table before anything is changed; all that it does not name is allowed.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from finespun.errors import StateError
from finespun.hosts.adapter_set import AdapterSet

Call = Literal[
    "adapt",
    "register",
    "activate",
    "rows",
    "disabled",
    "merge",
    "unmerge",
    "strength",
    "swap",
    "train",
    "evict",
    "detach",
    "bake",
    "fingerprint",
]  # what may be refused; a forward pass outside of training never is
State = Literal[
    "rows",
    "disabled",
    "merged",
    "unmerged",
    "for good",
    "gathered",
    "it acts",
    "it is merged",
    "it is merged for good",
    "it serves",
    "leaves merged ones out",
    "leaves others behind",
]


@dataclass(frozen=True)
class Move:
    """What an allowed call makes of the model."""

    call: Call
    after: str


@dataclass(frozen=True)
class Refusal:
    """A call that is refused in a state, and why; `{name}` is the adapter that is asked for,
    `{merged}` are those that are merged, `{others}` those that a call says nothing about."""

    call: Call
    state: State
    why: str


MOVES = (
    Move("adapt", "a new adapter acts alone and is trained alone; all else is frozen"),
    Move("register", "known (`load` then activates it); its modules are made when it first acts"),
    Move("activate", "these act, with their weights; the others rest in their layers"),
    Move("rows", "inside the block each row has the adapter that it names"),
    Move("disabled", "inside the block the model is its base, bit for bit"),
    Move("merge", "updates stand in the weights; undo='none' forgets the old ones"),
    Move("unmerge", "the very weights of before; the adapters act as they did"),
    Move("strength", "the adapter's whole update is multiplied by it"),
    Move("swap", "the same modules hold another adapter of the same form"),
    Move("train", "all but this adapter is frozen; it owns the buffers that training moves"),
    Move("evict", "its modules are gone, its state stays and wakes when it is activated"),
    Move("detach", "it is gone; after the last one the model is what it was"),
    Move("bake", "a plain model: updates in the weights, trained modules and buffers put in"),
    Move("fingerprint", "no change: the base is read, to save an adapter or to check one"),
)
LEAVE = "the model is inside disabled(), whose end puts back what stood before: leave that block "
GATHERED = "the units of {gathered!r} are gathered: leave that block first"
END = "{merged} is merged with undo='none', for good: bake() or detach() it first"
UNMERGE = "{merged} is merged into the weights; unmerge it first"
TABLE = (
    Refusal("adapt", "for good", END),
    Refusal("adapt", "merged", UNMERGE),
    Refusal("register", "disabled", LEAVE + "before adding an adapter"),
    Refusal("register", "gathered", GATHERED),
    Refusal("activate", "disabled", LEAVE + "before activating another adapter"),
    Refusal("activate", "leaves merged ones out", UNMERGE),
    Refusal("rows", "for good", END),
    Refusal("rows", "merged", UNMERGE),
    Refusal(
        "disabled",
        "for good",
        "merged with undo='none': the base cannot be shown; reload the model",
    ),
    Refusal("merge", "for good", END),
    Refusal("merge", "merged", "{merged} is merged already; unmerge first"),
    Refusal("merge", "rows", "rows have adapters of their own here: leave rows() before merging"),
    Refusal("merge", "disabled", LEAVE + "before merging"),
    Refusal("merge", "gathered", GATHERED),
    Refusal("unmerge", "disabled", LEAVE + "before unmerging"),
    Refusal("unmerge", "unmerged", "nothing is merged"),
    Refusal(
        "unmerge",
        "for good",
        "merged with undo='none': the base weights were not kept; bake() makes this model plain, "
        "or reload it",
    ),
    Refusal("strength", "it is merged for good", END),
    Refusal(
        "strength", "it is merged", "{name!r} is merged; unmerge it before changing its strength"
    ),
    Refusal("swap", "it is merged for good", END),
    Refusal(
        "swap", "it is merged", "{name!r} is merged; unmerge it before swapping its parameters"
    ),
    Refusal(
        "train",
        "merged",
        "{merged} is merged into the weights, where nothing is trained: unmerge before training, "
        "or call model.eval()",
    ),
    Refusal("evict", "disabled", LEAVE + "before evicting an adapter"),
    Refusal("evict", "it acts", "{name!r} is active; activate another adapter before evicting it"),
    Refusal("detach", "disabled", LEAVE + "before detaching an adapter"),
    Refusal("detach", "it is merged", "{name!r} is merged; unmerge it before detaching"),
    Refusal("detach", "it serves", "{name!r} serves rows; leave rows() before detaching it"),
    Refusal("bake", "disabled", LEAVE + "before baking"),
    Refusal("bake", "rows", "rows have adapters of their own here: leave rows() before baking"),
    Refusal("bake", "gathered", GATHERED),
    Refusal(
        "bake",
        "leaves others behind",
        "{others} would stand on another base then: detach them first, or bake them too",
    ),
    Refusal("bake", "leaves merged ones out", UNMERGE),
    Refusal("fingerprint", "gathered", GATHERED),
)


def states(adapter_set: AdapterSet, name: str | None = None) -> set[State]:
    """The states that a model is in; with a name, also those of that adapter."""
    found: set[State] = {"merged" if adapter_set.merged else "unmerged"}
    found |= {block.kind for block in adapter_set.blocks}
    if adapter_set.for_good:
        found.add("for good")
    if adapter_set.gathered:
        found.add("gathered")
    if name is not None:
        if adapter_set.used(name):
            found.add("it acts")
        if name in adapter_set.merged:
            found.add("it is merged for good" if adapter_set.for_good else "it is merged")
        if adapter_set.serves(name):
            found.add("it serves")
    return found


def check(
    adapter_set: AdapterSet,
    call: Call,
    name: str | None = None,
    asked: Collection[State] = (),
    others: Collection[str] = (),
) -> None:
    """Raise StateError where the table refuses this call now. `asked` are states that follow from
    what is asked for."""
    if adapter_set.broken and call not in ("fingerprint", "detach"):
        raise StateError(
            "a merge in place stopped half-way: the weights are neither the base's nor merged; "
            "reload the model"
        )
    found = {*states(adapter_set, name), *asked}
    for refusal in TABLE:
        if refusal.call == call and refusal.state in found:
            told = {"merged": ", ".join(adapter_set.merged), "others": ", ".join(others)}
            raise StateError(refusal.why.format(name=name, gathered=adapter_set.gathered, **told))


def table() -> str:
    """Both tables in Markdown, for the documentation."""
    lines = ["| call | what it makes of the model |", "| --- | --- |"]
    lines += [f"| {move.call} | {move.after} |" for move in MOVES]
    lines += ["", "| call | refused where | because |", "| --- | --- | --- |"]
    for refusal in TABLE:
        why = refusal.why.replace("{name!r}", "'NAME'").replace("{gathered!r}", "'NAME'")
        why = why.replace("{merged}", "NAME").replace("{others}", "NAMES")
        lines.append(f"| {refusal.call} | {refusal.state} | {why} |")
    return "\n".join(lines)
