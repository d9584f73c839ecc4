"""The `finespun` command: its subcommands, and how errors become one line and an exit code."""

import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import click
import typer

from finespun.cli import (
    bench,
    compare,
    convert,
    env,
    evaluate,
    explain,
    export,
    init,
    inspect,
    merge,
    methods,
    predict,
    report,
    schema,
    train,
)
from finespun.cli.missing import advice
from finespun.cli.screen import flagged
from finespun.errors import FinespunError
from finespun.storage.visible import one_line

INTERRUPTED, FILES, OTHER = 130, 3, 1
SHOWN = 300  # characters of an unforeseen error's text
# Loggers that warn, while transformers loads them, of kernels that nobody asked for.
TALKERS = ("torchao", "torch.utils._pytree")
CODES = (
    "Exit codes: 0 done, 1 other error, 2 wrong input, 3 files, 4 training failed, "
    "5 no ranking (bench), 130 interrupted."
)

app = typer.Typer(
    name="finespun",
    help="Adapt pretrained models with very few trained parameters.",
    epilog=f"Example: finespun train examples/trec-lsr-small.yaml\n\n{CODES}",
    no_args_is_help=True,
    suggest_commands=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# One module a command, in the order that help shows them; each has `command` and `EXAMPLE`.
COMMANDS = (
    train, bench, init, evaluate, predict, report, inspect, compare, convert, export, merge,
    methods, explain, schema, env,
)  # fmt: skip
for module in COMMANDS:
    name = module.__name__.rpartition(".")[2]
    app.command(name, epilog=f"Example: {module.EXAMPLE}")(module.command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    for talker in TALKERS:
        logging.getLogger(talker).setLevel(logging.ERROR)
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; what the user did wrong is reported in one line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warned
            warnings.filterwarnings("default", ".*since 0.2", DeprecationWarning)
            code = app(list(arguments), prog_name="finespun", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except FinespunError as error:
        return told(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        place = getattr(error, "ctx", None)
        command = "finespun" if place is None else place.command_path
        return told(f"{error.format_message()} Try: {command} --help", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return told("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OTHER
    except OSError as error:
        return told(str(error), FILES)
    except ModuleNotFoundError as error:
        return unforeseen(error) if (extra := advice(error)) is None else told(extra, OTHER)
    except Exception as error:
        return unforeseen(error)


def unforeseen(error: BaseException) -> int:
    """Tell an error that nobody foresaw in one line, with the place of a full report; returns the
    exit code."""
    what = one_line(str(error))[:SHOWN] or "no reason given"
    line = f"unforeseen {type(error).__name__}: {what}"
    try:
        handle, path = tempfile.mkstemp(prefix="finespun-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"finespun {version('finespun')}, Python {sys.version}\n")
            traceback.print_exception(error, file=file)
    except OSError as why:
        return told(f"{line}; no report could be written ({why.strerror})", OTHER)
    return told(f"{line}; the full report is in {path}", OTHER)


def warned(message: Warning | str, *origin: Any, **rest: Any) -> None:
    """Print a warning as one line on stderr, without the place in the code."""
    flagged("warning", "yellow", message)


def told(message: str, code: int) -> int:
    """Print `error: message` on stderr and return the code."""
    flagged("error", "red", message)
    return code
