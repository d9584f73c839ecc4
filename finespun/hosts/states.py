"""The states of an adapted model, and what is refused in each: one table.

A model is merged or not, and stands inside any number of `rows` and `disabled` blocks. `check`
looks at the table before anything is changed; all that it does not name is lawful.
"""

from dataclasses import dataclass
from typing import Literal

from finespun.errors import StateError
from finespun.hosts.adapter_set import AdapterSet

Call = Literal[
    "adapt", "register", "activate", "rows", "disabled", "merge", "unmerge", "evict", "detach"
]  # what may be refused; a forward pass, a training step and the rest never are
State = Literal[
    "rows", "disabled", "merged", "unmerged", "for good", "it acts", "it is merged", "it serves"
]


@dataclass(frozen=True)
class Refusal:
    """A call that is refused in a state, and why; `{name}` is the adapter that is asked for,
    `{merged}` are those that are merged."""

    call: Call
    state: State
    why: str


LEAVE = "the model is inside disabled(), whose end puts back what stood before: leave that block "
TABLE = (
    Refusal("adapt", "merged", "{merged} is merged into the weights; unmerge it first"),
    Refusal("register", "disabled", LEAVE + "before adding an adapter"),
    Refusal("activate", "disabled", LEAVE + "before activating another adapter"),
    Refusal("rows", "merged", "{merged} is merged into the weights; unmerge it first"),
    Refusal(
        "disabled",
        "for good",
        "merged with undo='none': the base cannot be shown; reload the model",
    ),
    Refusal("merge", "merged", "{merged} is merged already; unmerge first"),
    Refusal("merge", "rows", "rows have adapters of their own here: leave rows() before merging"),
    Refusal("merge", "disabled", LEAVE + "before merging"),
    Refusal("unmerge", "disabled", LEAVE + "before unmerging"),
    Refusal("unmerge", "unmerged", "nothing is merged"),
    Refusal(
        "unmerge",
        "for good",
        "merged with undo='none': the base weights were not kept; reload the model",
    ),
    Refusal("evict", "disabled", LEAVE + "before evicting an adapter"),
    Refusal("evict", "it acts", "{name!r} is active; activate another adapter before evicting it"),
    Refusal("detach", "it is merged", "{name!r} is merged; unmerge it before detaching"),
    Refusal("detach", "it serves", "{name!r} serves rows; leave rows() before detaching it"),
    Refusal("detach", "disabled", LEAVE + "before detaching an adapter"),
)


def states(adapter_set: AdapterSet, name: str | None = None) -> set[State]:
    """The states that a model is in; with a name, also those of that adapter."""
    found: set[State] = {"merged" if adapter_set.merged else "unmerged"}
    found |= {block.kind for block in adapter_set.blocks}
    if adapter_set.merged and adapter_set.kept is None:
        found.add("for good")
    if name is not None:
        served = () if adapter_set.rows is None else adapter_set.rows.names
        if adapter_set.used(name):
            found.add("it acts")
        if name in adapter_set.merged:
            found.add("it is merged")
        if name in served:
            found.add("it serves")
    return found


def check(adapter_set: AdapterSet, call: Call, name: str | None = None) -> None:
    """Raise StateError where the table refuses this call now."""
    found = states(adapter_set, name)
    for refusal in TABLE:
        if refusal.call == call and refusal.state in found:
            merged = ", ".join(adapter_set.merged)
            raise StateError(refusal.why.format(name=name, merged=merged))


def table() -> str:
    """The table in Markdown, for the documentation."""
    lines = ["| call | refused where | because |", "| --- | --- | --- |"]
    for refusal in TABLE:
        why = refusal.why.replace("{name!r}", "'NAME'").replace("{merged}", "NAME")
        lines.append(f"| {refusal.call} | {refusal.state} | {why} |")
    return "\n".join(lines)
