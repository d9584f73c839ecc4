"""The command line as a program: what it loads, what it says, and that it needs no net."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_recipe

from finespun.cli.app import COMMANDS, run


def test_help_loads_no_heavy_package() -> None:
    """Asking for help must not wait for torch, transformers, polars or pydantic."""
    code = (
        "import sys; from finespun.cli.app import run; run(['train', '--help']); "
        "heavy = ('torch', 'transformers', 'polars', 'pydantic', 'yaml'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_packages_that_talk_while_they_load_are_kept_quiet() -> None:
    """torchao and torch warn of kernels that nobody asked for; what is an error is still told."""
    code = (
        "import logging, sys; from finespun.cli import main\n"
        "try: main(['env'])\n"
        "except SystemExit: pass\n"
        "import torchao.quantization; logging.getLogger('torchao').error('a real one')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "a real one\n"


def test_a_closed_pipe_is_no_error() -> None:
    code = "from finespun.cli import main; main(['methods'])"
    command = f'"{sys.executable}" -c "{code}" | true'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "place", "offered"),
    [
        ("finespun ", 1, [module.__name__.rpartition(".")[2] for module in COMMANDS]),
        ("finespun train --res", 2, ["--resume"]),
        ("finespun schema ", 2, ["recipe", "bench"]),
    ],
)
def test_bash_completes_commands_options_and_words(
    words: str, place: int, offered: list[str]
) -> None:
    asked = {
        "_FINESPUN_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(place),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from finespun.cli import main; main([])"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(done.stdout.split()) == sorted(offered)


def test_nothing_of_a_run_needs_the_net(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"asked the net for {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    recipe, out = str(write_recipe(tmp_path, epochs=1)), str(tmp_path / "out")
    for arguments in (
        ["train", recipe, "--dry-run"],
        ["train", recipe, "-q"],
        ["evaluate", out],
        ["predict", out, "a lovely dog"],
        ["inspect", out],
        ["compare", out, out],
        ["report", out, "--json"],
        ["export", out, str(tmp_path / "lora")],
        ["convert", out, str(tmp_path / "small"), "--to", "lora", "--set", "rank=1"],
        ["merge", out, str(tmp_path / "whole")],
        ["schema", "bench", "--out", str(tmp_path / "bench.json"), "--json"],
        ["methods"],
        ["explain", "lsr"],
        ["env"],
    ):
        assert run(arguments) == 0, (arguments, capsys.readouterr().err)
    written = [json.loads(x) for x in capsys.readouterr().out.splitlines() if 'written":' in x]
    assert [Path(told["written"]).name for told in written] == ["report.html", "bench.json"]
