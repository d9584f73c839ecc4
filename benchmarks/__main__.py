"""Every measurement, or the parts that are named, in turn; writes docs/benchmarks.md."""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.dry_run import TIMES
from benchmarks.measure import ROUNDS, TRIES, WIDE, Lines, machine, part, spread, table

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
PARTS = {
    "training_step": "A training step",
    "many_adapters": "Many adapters",
    "mixed_rows": "Another adapter for each row",
    "forming": "Forming LSR's factors",
    "merging": "Merging",
    "switching": "Switching a SHiRA adapter",
    "structures": "A training step of each structure",
    "paths": "One layer beside its bare products",
    "dry_run": "What a dry run predicts",
}
HEAD = """\
# Beside PEFT

Written by `python -m benchmarks`; `python -m benchmarks merging paths` measures these parts again
and keeps the rest of the page.

Both sides hold the same weights and the same adapters and get the same batches. Outputs, gradients
or merged weights are compared first and must agree to 1e-5 (relative), else nothing is timed. One
thread, and a process of its own for every part; processor time, system time included; both sides in
turn, {rounds} rounds after one to warm up; the ratio is the median of the ratios of the rounds,
beside the middle half of them. "At least" is the gate in `benchmarks/gates.toml`. A ratio above 1
means that Finespun is faster.

The last part has no rival: small recipes are estimated as `finespun train --dry-run` does and then
carried out, {times} times each. No estimate may be off by more than the factor under "within", up
or down.

A fixed matrix product is timed in every round. Where it spreads by more than {wide:.0f} % (middle
half over median) the part is measured anew, at most {tries} times in all, and the calmest is shown.
"""


def head() -> str:
    """What the page says of all parts."""
    return HEAD.format(rounds=ROUNDS, wide=100 * WIDE, tries=TRIES, times=TIMES)


def section(name: str, lines: Lines, start: str, end: str) -> str:
    """One part of the page in Markdown, beside the load of the machine before and after it."""
    text = f"## {PARTS[name]}\n\n{table(lines)}\n\n"
    notes: dict[str, list[str]] = {}
    for line in lines:
        if line.note:
            notes.setdefault(line.note, []).append(line.name)
    text += "".join(f"- {' and '.join(n)}: {note}.\n" for note, n in notes.items())
    wide = spread(lines)
    busy = ": too busy, these figures mean little" if wide > WIDE else ""
    text += f"- Spread of the fixed product: {100 * wide:.0f} %{busy}.\n"
    return text + f"- {machine()}. Load average {start} before, {end} after.\n"


def sections(text: str) -> dict[str, str]:
    """The parts of a page that was written before."""
    named = {title: name for name, title in PARTS.items()}
    found = {part.partition("\n")[0]: f"## {part.strip()}\n" for part in text.split("\n## ")[1:]}
    return {named[title]: part for title, part in found.items() if title in named}


def load() -> str:
    """How busy the machine was in the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def main() -> None:
    """Measure, say what was measured, write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("part", nargs="*", help=f"any of {', '.join(PARTS)}; default: all")
    wanted = parser.parse_args().part or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    began = time.monotonic()
    done = sections(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for name in wanted:
            start = load()
            lines = processes.submit(part, name).result()
            done[name] = section(name, lines, start, load())
            print(table(lines), flush=True)
            parts = (done[name] for name in PARTS if name in done)
            PAGE.write_text("\n".join((head(), *parts)), encoding="utf-8")
    print(f"{PAGE.name} written after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
