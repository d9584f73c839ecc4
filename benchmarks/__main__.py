"""Every measurement, one after the other; writes docs/benchmarks.md."""

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
    "dry_run": "What a dry run foretells",
}
HEAD = """\
# Beside PEFT

Written by `python -m benchmarks`; `python -m benchmarks.merging` and its neighbours run one part.

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

{machine}. Load average at the start {start}, at the end {end}.
"""


def page(parts: dict[str, Lines], start: str, end: str) -> str:
    """The whole page in Markdown."""
    text = HEAD.format(
        rounds=ROUNDS,
        machine=machine(),
        start=start,
        end=end,
        wide=100 * WIDE,
        tries=TRIES,
        times=TIMES,
    )
    for name, lines in parts.items():
        text += f"\n## {PARTS[name]}\n\n{table(lines)}\n\n"
        notes: dict[str, list[str]] = {}
        for line in lines:
            if line.note:
                notes.setdefault(line.note, []).append(line.name)
        text += "\n".join(f"- {' and '.join(n)}: {note}." for note, n in notes.items()) + "\n"
        wide = spread(lines)
        busy = ": too busy, these figures mean little" if wide > WIDE else ""
        text += f"- Spread of the fixed product: {100 * wide:.0f} %{busy}.\n"
    return text


def load() -> str:
    """How busy the machine was in the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def main() -> None:
    """Measure everything, say what was measured, write the page."""
    start, began, parts = load(), time.monotonic(), {}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for name in PARTS:
            parts[name] = processes.submit(part, name).result()
            print(table(parts[name]), flush=True)
    text = page(parts, start, load())
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.name} written after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
