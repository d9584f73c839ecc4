"""A page that a person can read beside each run and each bench: one HTML file, nothing fetched."""

from finespun.report.write import report

__all__ = ["report"]
