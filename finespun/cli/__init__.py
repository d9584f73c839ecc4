"""The command line: parse, call, print."""

import sys
from collections.abc import Sequence

from finespun.cli.missing import advice


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code; where the packages that it
    needs are not installed, say which extra brings them."""
    try:
        from finespun.cli.app import main as run
    except ModuleNotFoundError as error:
        if (told := advice(error)) is None:
            raise
        sys.exit(f"error: {told}")
    run(arguments)


__all__ = ["main"]
