"""The command line: parse, call, print."""

from finespun.cli.app import app, main

__all__ = ["app", "main"]
