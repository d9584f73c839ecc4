"""LoR2C's events: neighbouring bypasses become one, a bypass becomes LoRAs inside its block.

Source: arXiv 2503.00572. Parameters keep shape and identity: what is merged away is switched off,
and the LoRAs inside sleep from the start, so that optimisers built before the events train them.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from finespun.contract import (
    AdapterView,
    Bypass,
    Delta,
    Setup,
    StepContext,
    Structure,
    TrainingHooks,
    module_group,
)
from finespun.contract.allocation import Allocation, register
from finespun.contract.structure import must_be_one_of
from finespun.errors import InputError
from finespun.methods.structures import LoR2C
from finespun.methods.structures.lor2c import spectrum_score

Keep = Literal["richer", "first", "svd"]
_NUMBER = re.compile(r"(.*?)(\d+)")


@register
@dataclass(frozen=True, kw_only=True)
class MergeInject(Allocation):
    """Merges and injections of LoR2C's bypasses, spread over the first quarter of a run.

    Event i of `count` falls after step ⌈i·steps / (4·count)⌉, a merge before an injection. A merge
    joins the two neighbours with the least sum of sfs, the measure of how flat a spectrum is (with
    `flattest` the greatest, the rule of the published code); an injection takes the bypass around
    one block with the least sfs and fades it out over `fade` steps (0: at once) while the LoRAs
    inside learn. `keep` is that of `merge`: "richer", "first" or "svd". Source: arXiv 2503.00572.
    """

    merges: int = 0
    injects: int = 0
    keep: Keep = "richer"
    flattest: bool = False
    fade: int = 50

    kind = "merge_inject"
    source = "arXiv 2503.00572"

    def __post_init__(self) -> None:
        must_be_one_of("keep", self.keep, get_args(Keep))
        if min(self.merges, self.injects, self.fade) < 0:
            raise InputError(
                f"merges={self.merges}, injects={self.injects} and fade={self.fade} must not be "
                "negative"
            )

    def suits(self, structure: Structure) -> None:
        if not isinstance(structure, LoR2C) or structure.rank < 2:
            seen = "rank 1" if isinstance(structure, LoR2C) else structure.kind
            raise InputError(f"merge_inject needs LoR2C of rank 2 or more, not {seen}")

    def check(self, adapter: AdapterView, steps: int) -> None:
        """Raise InputError where a run of so many steps cannot make these events."""
        self.suits(adapter.structure)
        if steps < 1:
            raise InputError(f"merge_inject needs at least one step, not {steps}")
        pairs = len(neighbours(adapter))
        if self.merges > pairs:
            raise InputError(f"merges={self.merges}, but there are {pairs} neighbouring bypasses")
        left, rest = len(lone(adapter)) - 2 * self.merges, steps - math.ceil(steps / 4)
        if self.injects and self.injects > left:
            raise InputError(
                f"injects={self.injects}, but after {self.merges} merges only {max(left, 0)} "
                "bypasses around one block with targets inside are sure to be left"
            )
        if self.injects and self.fade > rest:
            raise InputError(
                f"fade={self.fade} does not end in {steps} steps: {rest} of them follow the last "
                f"injection; try fade={rest // 2}"
            )

    def hooks(self) -> "Events":
        return Events(self)


class Events(TrainingHooks):
    """The merges and injections of one run; `events` lists what happened."""

    adapter: AdapterView
    steps: int

    def __init__(self, form: MergeInject) -> None:
        self.form = form
        self.due = {"merge": form.merges, "inject": form.injects}
        self.events: list[dict[str, Any]] = []
        self.fading: dict[str, int] = {}

    def prepare(self, setup: Setup) -> None:
        self.form.check(setup.adapter, setup.steps)
        self.adapter, self.steps = setup.adapter, setup.steps

    def after_step(self, context: StepContext) -> None:
        step = context.step + 1
        for block in list(self.fading):
            self._dim(block, step)
        for what, act in (("merge", self._merge), ("inject", self._inject)):
            wanted = min(self.due[what], 4 * self.due[what] * step // self.steps)
            for _ in range(wanted - sum(e["event"] == what for e in self.events)):
                self.events.append({"event": what, "step": step, **act(step)})

    def news(self, step: int) -> list[str]:
        return [
            f"{e['event']} of {' and '.join(e['blocks'])} after step {step}, sfs {e['sfs']:.3f}"
            for e in self.events
            if e["step"] == step
        ]

    def _merge(self, step: int) -> dict[str, Any]:
        """Join the pair that the rule picks."""
        deltas = self.adapter.deltas
        sums = {p: sum(score(deltas[n]) for n in p) for p in neighbours(self.adapter)}
        if not sums:
            raise InputError("no two neighbouring bypasses are left to merge")
        pick = (max if self.form.flattest else min)(sums, key=lambda pair: sums[pair])
        merge(self.adapter, *pick, self.form.keep)
        return {"blocks": list(pick), "sfs": sums[pick]}

    def _inject(self, step: int) -> dict[str, Any]:
        """Wake the LoRAs inside the block that the rule picks."""
        scores = {n: score(self.adapter.deltas[n]) for n in lone(self.adapter)}
        if not scores:
            raise InputError("no bypass around one block with targets inside is left to inject")
        block = min(scores, key=lambda n: scores[n])
        inject(self.adapter, block)
        self.fading[block] = step
        self._dim(block, step)
        return {"blocks": [block], "sfs": scores[block]}

    def _dim(self, block: str, step: int) -> None:
        """Let the bypass fade, and switch it off at the end."""
        delta, passed = self.adapter.deltas[block], step - self.fading[block]
        left = 1 - passed / self.form.fade if self.form.fade else 0.0
        if delta.gating is None:
            delta.set_gate(
                torch.ones(self.adapter.plan.choices[block]["rank"]).to(delta.site.device)
            )
        delta.get_buffer("gate").fill_(left)
        if left <= 0:
            delta.switch_off(module_group(delta))
            del self.fading[block]

    def state_dict(self) -> dict[str, Any]:
        choices = {name: dict(choice) for name, choice in self.adapter.plan.choices.items()}
        return {"events": list(self.events), "fading": dict(self.fading), "choices": choices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.events, self.fading = list(state["events"]), dict(state["fading"])
        _settle(self.adapter, state["choices"])


def merge(adapter: AdapterView, first: str, second: str, keep: Keep = "richer") -> None:
    """One bypass instead of two neighbours: from where `first` reads to where `second` adds.

    It is the one with the flatter spectrum, or the first, or (svd) the best one of the same rank
    for the sum of both, which takes the place of the first's parameters. The other is switched off.
    Raises InputError unless the second begins right behind the first.
    """
    must_be_one_of("keep", keep, get_args(Keep))
    if (first, second) not in (known := neighbours(adapter)):
        raise InputError(
            f"{first!r} and {second!r} are no neighbouring bypasses; there are {known}"
        )
    one, other = adapter.deltas[first], adapter.deltas[second]
    richer = keep == "richer" and score(other) > score(one)
    kept, gone = (second, first) if richer else (first, second)
    if keep == "svd":
        _sum(one, other)
    adapter.deltas[gone].switch_off(module_group(adapter.deltas[gone]))
    ends = [span(adapter, first)[0], span(adapter, second)[1]]
    plan = adapter.plan.choose(gone, span=None).choose(kept, span=ends)
    _settle(adapter, plan.choices)


@torch.no_grad()
def _sum(one: Delta, other: Delta) -> None:
    """Let the first be the best of its rank for the sum of both; exact where they share A."""
    mine = dict(one.named_parameters())
    if "A" not in mine:
        mine["B"].add_(other.get_parameter("B"))
        return
    both = (one.as_low_rank() + other.as_low_rank()) * (1 / one.scale)
    best = both.squeeze(len(mine["A"]))
    mine["A"].copy_(best.A)
    mine["B"].copy_(best.B)


def inject(adapter: AdapterView, block: str) -> None:
    """Wake the LoRAs inside a block, A drawn and B zero; its bypass stays. Raises InputError where
    no layer inside is a target."""
    names = inside(adapter, block)
    if not names:
        raise InputError(f"no layer inside {block!r} is a target; try 'query' and 'value' as well")
    plan = adapter.plan
    for name in names:
        delta = adapter.deltas[name]
        A = delta.get_parameter("A")
        with torch.no_grad():
            A.copy_(adapter.structure.kaiming(name, "A", A.shape))
            delta.get_parameter("B").zero_()
        delta.switch_on()
        plan = plan.choose(name, asleep=False)
    _settle(adapter, plan.choices)


def neighbours(adapter: AdapterView) -> list[tuple[str, str]]:
    """Pairs of bypasses of which the second begins right behind the first, in one list of blocks
    and of one width."""
    living = {n: span(adapter, n) for n in _living(adapter)}
    found = []
    for one, (_, last) in living.items():
        for other, (first, _) in living.items():
            ends = [_NUMBER.fullmatch(name) for name in (last, first)]
            widths = {adapter.deltas[name].site.shape.in_features for name in (one, other)}
            if all(ends) and len(widths) == 1:
                (before, i), (behind, j) = (end.groups() for end in ends if end)
                if before == behind and int(j) == int(i) + 1:
                    found.append((one, other))
    return found


def lone(adapter: AdapterView) -> list[str]:
    """Blocks with a living bypass of their own and sleeping layers inside."""
    choices = adapter.plan.choices
    return [
        name
        for name in _living(adapter)
        if span(adapter, name) == (name, name)
        and any(choices[n].get("asleep") for n in inside(adapter, name))
    ]


def inside(adapter: AdapterView, block: str) -> list[str]:
    """The sites inside a block."""
    return [s.name for s in adapter.plan.sites if s.name.startswith(block + ".")]


def span(adapter: AdapterView, name: str) -> tuple[str, str]:
    """The first and last block that a bypass goes around."""
    first, last = adapter.plan.choices[name].get("span") or (name, name)
    return first, last


def score(delta: Delta) -> float:
    """sfs of an update; 0.0 while it is zero."""
    return spectrum_score(delta).get("sfs", 0.0)


def _living(adapter: AdapterView) -> list[str]:
    """Bypasses that are neither switched off nor fading."""
    return [
        name
        for name, delta in adapter.deltas.items()
        if isinstance(delta, Bypass) and not delta.silent and delta.gating is None
    ]


def _settle(adapter: AdapterView, choices: Any) -> None:
    """Make these choices the adapter's own: bypasses go where they say."""
    adapter.replan(dataclasses.replace(adapter.plan, choices=choices))
