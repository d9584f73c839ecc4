"""The command line as a program: what it loads, what it says, and that it needs no net."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from tiny_run import tiny_table, write_recipe

import finespun as fs
from finespun.cli.app import COMMANDS, app, run
from finespun.cli.missing import EXTRAS

pytestmark = pytest.mark.slow

TELL = {"train", "bench"}  # commands that tell how far they are


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
    missing: str, arguments: list[str], extra: str, tmp_path: Path
) -> None:
    tiny_table(tmp_path / "rows.csv")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: minilm-l3\ndata: {{file: {tmp_path / 'rows.csv'}}}\n")
    done = without([missing], [str(recipe) if a == recipe.name else a for a in arguments])
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


def program(arguments: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    """The command, with these variables in its environment."""
    return subprocess.run(
        [sys.executable, "-c", f"from finespun.cli import main; main({arguments!r})"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )


def without(
    packages: list[str], *commands: list[str], then: str = ""
) -> subprocess.CompletedProcess[str]:
    """Commands, up to the first that fails, where these packages cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
        "from finespun.cli import main\n"
        f"for arguments in {commands!r}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit as ended:\n"
        "        if ended.code: raise\n"
        f"{then}"
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
    assert sorted(program([], **asked).stdout.split()) == sorted(offered)


@pytest.mark.parametrize(
    ("shell", "words", "offered"),
    [
        ("zsh", "finespun tr", ["train"]),
        ("zsh", "finespun train --res", ["--resume"]),
        ("zsh", "finespun schema ", ["recipe", "bench"]),
        ("fish", "finespun tr", ["train"]),
        ("fish", "finespun train --res", ["--resume"]),
        ("fish", "finespun schema ", ["recipe", "bench"]),
    ],
)
def test_zsh_and_fish_are_answered_as_they_ask(shell: str, words: str, offered: list[str]) -> None:
    """Neither shell is run: this is what its script asks, and the form that it reads."""
    asked = {"_FINESPUN_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": words}
    told = program([], **asked, _TYPER_COMPLETE_FISH_ACTION="get-args").stdout
    if shell == "zsh":
        assert told.startswith("_arguments '*: :((")
        assert re.findall(r'"([^":]+)"(?::"|\n|\))', told) == offered
    else:
        assert [line.partition("\t")[0] for line in told.splitlines()] == offered
        assert program([], **asked, _TYPER_COMPLETE_FISH_ACTION="is-args").returncode == 0


@pytest.mark.parametrize(
    ("shell", "registers", "written"),
    [
        ("bash", "complete -o default -F _finespun_completion finespun", ".bash_completions/*"),
        ("zsh", "compdef _finespun_completion finespun", ".zfunc/_finespun"),
        ("fish", "complete --command finespun", ".config/fish/completions/finespun.fish"),
    ],
)
def test_completion_is_shown_and_installed_for_the_shell_that_asks(
    shell: str, registers: str, written: str, tmp_path: Path
) -> None:
    """The shell is found by the name of the calling program, here a bash under that name."""
    caller = tmp_path / shell
    shutil.copy(str(shutil.which("bash")), caller)
    code = "from finespun.cli import main; main()"
    told = {}
    for option in ("--show-completion", "--install-completion"):
        done = subprocess.run(
            [caller, "-c", f'"{sys.executable}" -c "{code}" {option}; exit $?'],
            env={**os.environ, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        told[option] = done.stdout
    script = told["--show-completion"]
    assert registers in script
    assert f"_FINESPUN_COMPLETE=complete_{shell}" in script
    assert f"{shell} completion installed in" in told["--install-completion"]
    [file] = tmp_path.glob(written)
    assert file.read_text().strip() == script.strip()


def test_what_reads_adapters_loads_no_compiler(tmp_path: Path) -> None:
    """Torch's compiler takes longer to load than these commands take."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    folder = str(tmp_path / "adapter")
    fs.adapt(model, fs.LSR(rank=2, separation_rank=1), ["0"], train_modules=[]).save(folder)
    commands = (["inspect", folder], ["compare", folder, folder])
    commands += (["convert", folder, str(tmp_path / "other"), "--to", "lora"],)
    done = without([], *commands, then="print('torch._dynamo' in sys.modules)")
    assert done.stdout.splitlines()[-1] == "False"


class Untouched:
    """A standard input that nobody may read."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"standard input was asked for {name}")


def test_nothing_of_a_run_needs_the_net(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor standard input; and only commands with --quiet tell how far they are."""

    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"asked the net for {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(sys, "stdin", Untouched())
    recipe, out = str(write_recipe(tmp_path, epochs=1)), str(tmp_path / "out")
    table, model = str(tmp_path / "table.csv"), str(tmp_path / "model")
    bench, members = tmp_path / "bench.yaml", [{"targets": [], "lr": 1e-2}]
    shared = yaml.safe_load(Path(recipe).read_text())
    kept = {key: shared[key] for key in ("model", "data", "targets")}
    training = {"epochs": 1, "batch_size": 32, "threads": 1}
    content = {"recipe": {**kept, "training": training}, "members": members, "seeds": [0]}
    bench.write_text(yaml.safe_dump({**content, "output": str(tmp_path / "bench")}))
    written = []
    capsys.readouterr()
    for arguments in (
        ["init", table, model, "--out", str(tmp_path / "first.yaml")],
        ["train", recipe, "--dry-run"],
        ["train", recipe, "-q"],
        ["evaluate", out],
        ["predict", out, "a lovely dog"],
        ["bench", str(bench)],
        ["report", str(tmp_path / "bench"), "--json"],
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
        code, told = run(arguments), capsys.readouterr()
        assert code == 0, (arguments, told.err)
        assert told.err == "" or (arguments[0] in TELL and "-q" not in arguments), arguments
        written += [json.loads(x)["written"] for x in told.out.splitlines() if 'written":' in x]
    assert [Path(name).name for name in written] == ["report.html", "report.html", "bench.json"]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    quiet = {n for n, c in commands.items() if any("--quiet" in p.opts for p in c.params)}
    assert quiet == TELL
