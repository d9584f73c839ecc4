"""Comparisons: members at equal budgets, each at its own best learning rate, over seeds."""

from finespun.bench.budget import fit
from finespun.bench.run import Bench
from finespun.bench.spec import BenchSpec, Member, Search
from finespun.bench.summary import Row, Summary

__all__ = ["Bench", "BenchSpec", "Member", "Row", "Search", "Summary", "fit"]
