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
from finespun.cli.missing import EXTRAS


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


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("click", ["env"], "cli"),
        ("rich", ["bench", "bench.yaml"], "cli"),
        ("yaml", ["explain", "lsr"], "cli"),
        ("polars", ["train", "recipe.yaml"], "train"),
        ("scipy", ["bench", "bench.yaml"], "bench"),
    ],
)
def test_a_package_that_is_not_installed_is_told_with_its_extra(
    missing: str, arguments: list[str], extra: str
) -> None:
    done = without([missing], arguments)
    assert (done.returncode, done.stdout) == (1, "")
    advice = f"try: pip install 'finespun[{extra}]'"
    assert done.stderr == f"error: {missing} is not installed; {advice}\n"


def test_another_package_that_is_missing_is_a_mistake_of_ours() -> None:
    done = without(["finespun.errors"], ["env"])
    assert "Traceback" in done.stderr


def test_a_run_and_its_page_need_no_package_of_the_bench(tmp_path: Path) -> None:
    of_bench = [name for name, extra in EXTRAS.items() if extra == "bench"]
    recipe, out = str(write_recipe(tmp_path, epochs=1)), str(tmp_path / "out")
    done = without(of_bench, ["train", recipe, "--quiet"], ["report", out], ["schema", "recipe"])
    assert done.returncode == 0, done.stderr


def without(packages: list[str], *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Commands, up to the first that fails, where these packages cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
        "from finespun.cli import main\n"
        f"for arguments in {commands!r}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit as ended:\n"
        "        if ended.code: raise"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


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
