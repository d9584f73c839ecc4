"""The command line: parse, call, print."""

from finespun.cli.app import main

__all__ = ["main"]
