"""What the trials say: a row for each member, and whether they may be ranked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finespun.bench.budget import LEAST_SHARE
from finespun.contract import Structure

LEVEL = 0.95


@dataclass(frozen=True)
class Row:
    """One member at one size. `scores`: the metric for every seed, None where the run diverged.
    `seconds` and `cpu_seconds`: mean over the seeds, in training steps and of the whole process.
    `lr_of`: the row whose learning rate was carried over to this one."""

    name: str
    structure: Structure
    targets: str | tuple[str, ...]
    budget: int | None
    num_update_parameters: int
    num_module_parameters: int
    bytes: int
    lr: float | None
    lrs: tuple[float, ...]
    at_edge: bool
    scores: tuple[float | None, ...]
    seconds: float
    cpu_seconds: float
    lr_of: str | None = None

    @property
    def paired_at(self) -> int | None:
        """The budget, where what was trained in the end meets it; else None."""
        if self.budget is None:
            return None
        meets = LEAST_SHARE * self.budget <= self.num_update_parameters <= self.budget
        return self.budget if meets else None

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None if any of them diverged."""
        known = [score for score in self.scores if score is not None]
        return sum(known) / len(known) if known and len(known) == len(self.scores) else None

    @property
    def half(self) -> float | None:
        """Half the 95 % interval of the mean; None where the mean is, or with one seed."""
        if self.mean is None:
            return None
        return half_interval([score for score in self.scores if score is not None])


@dataclass(frozen=True)
class Difference:
    """Two members at one budget: mean of (first − second), paired by seed, with its interval."""

    budget: int
    first: str
    second: str
    mean: float
    half: float | None


@dataclass(frozen=True)
class Summary:
    """A finished bench. `command` is what made it."""

    rows: tuple[Row, ...]
    metric: str
    seeds: tuple[int, ...]
    test_rows: int
    command: str

    @property
    def refusal(self) -> str | None:
        """Why no ranking may be drawn from these rows, or None."""
        edges = [row for row in self.rows if row.at_edge and row.lr_of is None]
        if edges:
            told = "; ".join(map(self._edge, edges))
            why = "the best learning rate lies at the edge of its grid"
            return f"no ranking: {why} ({told}); widen lrs"
        failed = [row.name for row in self.rows if row.mean is None]
        return f"no ranking: runs diverged ({', '.join(failed)})" if failed else None

    def _edge(self, row: Row) -> str:
        """A best learning rate, its grid, and the rows that it was carried over to."""
        text = f"{row.name}: {row.lr:g} of {row.lrs[0]:g} to {row.lrs[-1]:g}"
        followers = [other.name for other in self.rows if other.lr_of == row.name]
        return text + (f", carried over to {', '.join(followers)}" if followers else "")

    @property
    def ranking(self) -> tuple[Row, ...]:
        """Rows by falling mean; empty where there is a refusal."""
        if self.refusal is not None:
            return ()
        return tuple(sorted(self.rows, key=lambda row: -(row.mean or 0.0)))

    @property
    def differences(self) -> tuple[Difference, ...]:
        """For every budget that several members were fitted to, and that what they trained in the
        end meets: each against the first of them."""
        groups: dict[int, list[Row]] = {}
        for row in self.rows:
            if row.paired_at is not None and row.mean is not None:
                groups.setdefault(row.paired_at, []).append(row)
        return tuple(
            compare(other, rows[0], budget)
            for budget, rows in sorted(groups.items(), reverse=True)
            for other in rows[1:]
        )

    def as_json(self) -> dict[str, Any]:
        """Everything in the tables as JSON values."""
        return {
            "metric": self.metric,
            "seeds": list(self.seeds),
            "test_rows": self.test_rows,
            "rows": [{**cells(row), "scores": list(row.scores)} for row in self.rows],
            "differences": [vars(difference) for difference in self.differences],
            "ranking": [row.name for row in self.ranking],
            "refusal": self.refusal,
            "command": self.command,
        }


def compare(first: Row, second: Row, budget: int) -> Difference:
    """The paired difference of two members that have a score for every seed."""
    pairs = zip(first.scores, second.scores, strict=True)
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    return Difference(budget, first.name, second.name, sum(gaps) / len(gaps), half_interval(gaps))


def half_interval(values: Sequence[float]) -> float | None:
    """t·s/√n: half the 95 % interval of the mean of n values by Student's t; None for one value.

    >>> round(half_interval([0.80, 0.82, 0.84]), 4)
    0.0497
    """
    from scipy.stats import t as student

    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return float(student.ppf(0.5 + LEVEL / 2, n - 1)) * deviation / math.sqrt(n)


def cells(row: Row) -> dict[str, Any]:
    """A row as plain values, by column name; the same in every form of the table."""
    targets = row.targets if isinstance(row.targets, str) else ", ".join(row.targets)
    return {
        "member": row.name,
        "targets": targets,
        "budget": row.budget,
        "num_update_parameters": row.num_update_parameters,
        "num_head_parameters": row.num_module_parameters,
        "adapter_bytes": row.bytes,
        "best_lr": row.lr,
        "lr_at_edge": row.at_edge,
        "mean": row.mean,
        "half_interval_95": row.half,
        "runs": len(row.scores),
        "seconds": row.seconds,
        "cpu_seconds": row.cpu_seconds,
    }
