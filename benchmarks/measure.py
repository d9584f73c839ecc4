"""How times are taken: one thread, processor time, interleaved rounds, medians of ratios by round.

FINESPUN_DEVICE=cuda runs it all on a GPU: there the clock runs until the device has nothing to do.

A fixed matrix product is timed in every round as well; where its spread is wide the machine was
too busy for the figures to mean much, and the report says so.
"""

import gc
import importlib
import os
import platform
import statistics
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

torch.set_num_threads(1)
DEVICE = torch.device(os.environ.get("FINESPUN_DEVICE", "cpu"))
if DEVICE.type != "cpu":
    torch.set_default_device(DEVICE)
ROUNDS = 15
LEAST = 0.02
WIDE = 0.25
TRIES = 3
GATES = Path(__file__).with_name("gates.toml")

Work = Callable[[], object]


@dataclass
class Timed:
    """Seconds of each contestant and of the fixed product, one figure a round."""

    seconds: dict[str, list[float]]
    product: list[float] = field(default_factory=list)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, over: str, under: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[over], self.seconds[under])]

    @property
    def spread(self) -> float:
        """That of the fixed product."""
        return width(self.product)


@dataclass(frozen=True)
class Line:
    """One line of the report: milliseconds, and PEFT's time (or the named rival's) over ours."""

    name: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    spread: float
    rival: str = "PEFT"
    note: str = ""

    gates: ClassVar[str] = "gates"
    head: ClassVar[tuple[str, str]] = (
        "| what | ours, ms | rival, ms | rival / ours | middle half | at least | met |",
        "| --- | ---: | ---: | ---: | --- | ---: | --- |",
    )

    def row(self, gate: float | None) -> str:
        """The line in Markdown, beside what it must reach."""
        rival = f"{self.theirs:.3g}" + ("" if self.rival == "PEFT" else f" ({self.rival})")
        return (
            f"| {self.name} | {self.ours:.3g} | {rival} | {self.ratio:.2f} | "
            f"{self.low:.2f} to {self.high:.2f} | {reached(gate, self.ratio)} |"
        )

    @classmethod
    def of(
        cls, name: str, timed: Timed, rival: str = "PEFT", note: str = "", ours: str = "ours"
    ) -> "Line":
        ratios = timed.ratios(rival, ours)
        low, middle, high = statistics.quantiles(ratios, n=4)
        return cls(
            name,
            1e3 * timed.median(ours),
            1e3 * timed.median(rival),
            middle,
            low,
            high,
            timed.spread,
            rival,
            note,
        )


@dataclass(frozen=True)
class Foretold:
    """One line about an estimate: seconds estimated and real, one of each a round."""

    name: str
    estimated: Sequence[float]
    real: Sequence[float]
    spread: float
    note: str = ""

    gates: ClassVar[str] = "within"
    head: ClassVar[tuple[str, str]] = (
        "| what | estimated, s | real, s | estimated / real | least and most | within | met |",
        "| --- | ---: | ---: | ---: | --- | ---: | --- |",
    )

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.estimated, self.real)]

    def row(self, gate: float | None) -> str:
        """The line in Markdown, beside the factor that no round may be off by, up or down."""
        ratios = self.ratios
        least = None if gate is None else 1 / gate
        met = min(*ratios, *(1 / r for r in ratios))
        return (
            f"| {self.name} | {statistics.median(self.estimated):.3g} | "
            f"{statistics.median(self.real):.3g} | {statistics.median(ratios):.2f} | "
            f"{min(ratios):.2f} to {max(ratios):.2f} | {reached(least, met, gate)} |"
        )


Lines = Sequence[Line] | Sequence[Foretold]


def reached(least: float | None, found: float, shown: float | None = None) -> str:
    """The last two cells: the gate, and whether it is met."""
    if least is None:
        return " | "
    return f"{least if shown is None else shown} | {'yes' if found >= least else '**no**'}"


def width(seconds: Sequence[float]) -> float:
    """Width of the middle half of times, over their median."""
    quarters = statistics.quantiles(seconds, n=4)
    return (quarters[2] - quarters[0]) / quarters[1]


def nothing() -> None:
    """The work before or after a timed call where there is none."""


def timed(
    contestants: Mapping[str, Work],
    after: Mapping[str, Work] | None = None,
    rounds: int = ROUNDS,
    least: float = LEAST,
    before: Work = nothing,
) -> Timed:
    """Time each contestant once a round, in an order that turns; `before` prepares each call and
    `after` undoes it, both untimed.

    Without anything to undo, a call is repeated until it lasts `least` seconds.
    """
    undo = after or {}
    repeats = {
        name: 1 if name in undo else _repeats(work, least) for name, work in contestants.items()
    }
    found = Timed({name: [] for name in contestants})
    names = list(contestants)
    gc.collect()
    gc.disable()
    try:
        for number in range(-1, rounds):  # the first round warms up
            product = fixed_product()
            turned = names[number % len(names) :] + names[: number % len(names)]
            taken = {}
            for name in turned:
                before()
                taken[name] = _seconds(contestants[name], repeats[name])
                undo.get(name, nothing)()
            if number >= 0:
                found.product.append(product)
                for name, seconds in taken.items():
                    found.seconds[name].append(seconds)
    finally:
        gc.enable()
    return found


def fixed_product() -> float:
    """Seconds of the product that shows how steady the machine is."""
    a, b = torch.ones(512, 768), torch.ones(768, 768)
    return _seconds(lambda: a @ b, 4)


def _seconds(work: Work, repeats: int) -> float:
    start = _clock()
    for _ in range(repeats):
        work()
    return (_clock() - start) / repeats


def _clock() -> float:
    """Processor time; on another device the time when all that it was asked for is done."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(DEVICE)
    return time.perf_counter()


def _repeats(work: Work, least: float) -> int:
    work()
    once = max(_seconds(work, 1), 1e-7)
    return max(1, min(2000, round(least / once)))


def gates(kind: str = Line.gates) -> dict[str, float]:
    """What each line must reach, or be `within`."""
    return dict(tomllib.loads(GATES.read_text(encoding="utf-8"))[kind])


def machine() -> str:
    """Processor, cores, memory and versions."""
    import peft
    import transformers

    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text(encoding="utf-8").splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    place = "" if DEVICE.type == "cpu" else f"{torch.cuda.get_device_name(DEVICE)}; "
    return (
        f"{place}{names[0] if names else platform.machine()}, {os.cpu_count()} cores, "
        f"{memory:.0f} GiB, one thread; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"PEFT {peft.__version__}"
    )


def table(lines: Lines) -> str:
    """The lines of a part in Markdown."""
    least = gates(lines[0].gates)
    return "\n".join([*lines[0].head, *(line.row(least.get(line.name)) for line in lines)])


def spread(lines: Lines) -> float:
    """The widest spread of the fixed product in a part."""
    return max(line.spread for line in lines)


def calmest(measure: Callable[[], Lines]) -> Lines:
    """The part's lines, measured until the fixed product is steady enough."""
    found: list[Lines] = []
    while len(found) < TRIES and (not found or spread(found[-1]) > WIDE):
        found.append(measure())
        gc.collect()
    return min(found, key=spread)


def part(name: str) -> Lines:
    """The part benchmarks/`name`.py, in the process that this runs in."""
    return calmest(importlib.import_module(f"benchmarks.{name}").measure)


def report(measure: Callable[[], Lines]) -> None:
    """Print what one module measured."""
    lines = measure()
    print(machine())
    print(table(lines))
    for line in lines:
        if line.note:
            print(f"{line.name}: {line.note}")
    widest = spread(lines)
    print(f"Spread of the fixed product: at most {100 * widest:.0f} %")
    if widest > WIDE:
        print(f"More than {100 * WIDE:.0f} %: the machine is too busy, run it again")
