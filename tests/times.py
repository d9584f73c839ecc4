"""Seconds of the tests by folder, beside their budgets: `make times`.

A run leaves `.pytest_cache/d/finespun/times.json`; `python tests/times.py` reads it. What counts is
the processor's time of a test and of the processes that it started and waited for: it depends
little on what else a machine does. `--check` fails where a folder is beyond its budget or a test
beyond its tier's, `--record FILE` keeps date, commit and figures.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LAST, BUDGETS = ROOT / ".pytest_cache/d/finespun/times.json", ROOT / "tests/times.toml"
KEY, SLOWEST = "cpu", 20


def processor() -> float:
    """Seconds of this process and of those that it waited for."""
    return sum(os.times()[:4])


class Watch:
    """In every worker: notes the processor's time of a test, set-up and tear-down included."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        item.stash[STARTED] = processor()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        if report.when == "teardown":
            report.user_properties.append((KEY, processor() - item.stash[STARTED]))
        return report


STARTED = pytest.StashKey[float]()


class Record:
    """In the process that reports: adds up what the workers noted and writes it down."""

    def __init__(self, tier: str, workers: int, whole: bool) -> None:
        self.tier, self.workers, self.whole = tier, workers, whole
        self.began, self.collected = time.time(), 0.0
        self.tests: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.failed: list[str] = []

    def pytest_collection_finish(self) -> None:
        self.collected = self.collected or time.time() - self.began

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self) -> None:
        self.pytest_collection_finish()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = self.tests[report.nodeid]
        seconds[0] += report.duration
        seconds[1] += sum(value for key, value in report.user_properties if key == KEY)
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        if not self.tests:
            return
        LAST.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "tier": self.tier, "whole": self.whole, "workers": self.workers,
            "wall": time.time() - self.began, "collection": self.collected,
            "load": os.getloadavg()[0], "failed": self.failed, "tests": dict(self.tests),
        }  # fmt: skip
        LAST.write_text(json.dumps(figures))


def folder(test: str) -> str:
    """The folder of a test's file below tests/; "." for one that lies there itself.

    >>> folder("tests/files/test_files_peft.py::test_it[a/b]"), folder("tests/test_docs.py::test")
    ('files', '.')
    """
    parts = test.partition("::")[0].split("/")
    return "/".join(parts[1:-1]) or "."


def by_folder(tests: dict[str, list[float]]) -> dict[str, tuple[int, float]]:
    """Tests and processor seconds of each folder, the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for test, (_, seconds) in tests.items():
        found[folder(test)].append(seconds)
    sums = {name: (len(each), sum(each)) for name, each in found.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def beyond(run: dict[str, Any], budgets: dict[str, Any]) -> list[str]:
    """What takes longer than its budget: folders in a whole run, and single tests of the quick
    tier."""
    wrong, own = [], budgets.get(run["tier"], {})
    for name, (_, seconds) in by_folder(run["tests"]).items():
        if run["whole"] and seconds > own.get(name, own.get("other", float("inf"))):
            wrong.append(f"{name}: {seconds:.0f} s, its budget is {own.get(name, own['other'])} s")
    longest = budgets["longest"].get(run["tier"], float("inf"))
    for test, (_, seconds) in run["tests"].items():
        if seconds > longest:
            wrong.append(f"{test}: {seconds:.1f} s, a {run['tier']} test has at most {longest} s")
    return wrong


def table(run: dict[str, Any], budgets: dict[str, Any]) -> list[str]:
    """The run in a line, a line for each folder, and the slowest tests."""
    own, folders = budgets.get(run["tier"], {}), by_folder(run["tests"])
    total = sum(seconds for _, seconds in folders.values())
    lines = [
        f"tier {run['tier']}: {len(run['tests']):,} tests, {run['wall']:.0f} s with "
        f"{run['workers']} workers at load {run['load']:.1f}; {total:.0f} s of processor",
        f"{'seconds':>8} {'budget':>7} {'tests':>6}  folder",
    ]
    for name, (count, seconds) in folders.items():
        budget = own.get(name, own.get("other", ""))
        lines.append(f"{seconds:8.1f} {budget:>7} {count:6}  {name}")
    slowest = sorted(run["tests"].items(), key=lambda item: -item[1][1])[:SLOWEST]
    return [*lines, "", "the slowest:", *(f"{s:8.1f}  {test}" for test, (_, s) in slowest)]


def record(run: dict[str, Any], file: Path) -> None:
    """Write date, commit and figures of a run."""
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": head.stdout.strip(),
        **{k: run[k] for k in ("tier", "whole", "workers", "failed")},
        **{k: round(run[k], 1) for k in ("wall", "collection", "load")},
        "folders": {
            name: {"tests": count, "seconds": round(seconds, 1)}
            for name, (count, seconds) in by_folder(run["tests"]).items()
        },
    }
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the last run; 1 where --check finds something, 2 where there was no run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=LAST, help="what a run of pytest left")
    parser.add_argument("--check", action="store_true", help="fail where a budget is exceeded")
    parser.add_argument("--record", type=Path, help="a file for date, commit and figures")
    told = parser.parse_args(arguments)
    if not told.run.is_file():
        print(
            f"{told.run}: no run of the tests has left its times; run make check", file=sys.stderr
        )
        return 2
    run = json.loads(told.run.read_text(encoding="utf-8"))
    budgets = tomllib.loads(BUDGETS.read_text(encoding="utf-8"))
    print("\n".join(table(run, budgets)))
    if told.record:
        record(run, told.record)
    wrong = beyond(run, budgets)
    print("\n".join(["", *wrong]) if wrong else "\nall within their budgets")
    return int(told.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
