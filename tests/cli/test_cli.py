"""The command line: what each command prints, one clear line for every mistake, exit codes."""

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from tiny_run import tiny_model, tiny_table, write_recipe

import finespun
from finespun import errors as all_errors
from finespun.cli import app as cli
from finespun.cli.app import COMMANDS, app, run
from finespun.cli.bench import NO_RANKING
from finespun.errors import StateError
from finespun.methods.axes import AXES
from finespun.methods.structures import LoRA
from finespun.training.inference import Trained
from finespun.training.loop import Interrupted
from finespun.training.output import Result


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a table, run.yaml and a finished run in out."""
    folder = tmp_path_factory.mktemp("cli")
    assert run(["train", str(write_recipe(folder)), "--quiet"]) == 0
    return folder


Captured = pytest.CaptureFixture[str]


def fails(arguments: list[str], code: int, capsys: Captured, *parts: str) -> str:
    """The command ends with `code` and one error message that holds all `parts`."""
    assert run(arguments) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    assert shown.err.count("error:") == 1
    for part in parts:
        assert part in shown.err, shown.err
    return shown.err


# --- help ----------------------------------------------------------------------------------------
def test_help_names_commands_example_and_exit_codes(capsys: Captured) -> None:
    assert run(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for module in COMMANDS:
        assert module.__name__.rpartition(".")[2] in shown
    assert "Example: finespun train examples/trec-lsr-small.yaml" in shown
    for code in ("0 done", "1 other error", "2 wrong input", "3 files", "4 training failed"):
        assert code in shown
    assert "130 interrupted" in shown


@pytest.mark.parametrize("module", COMMANDS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_command_has_help_for_all_and_an_example(module: Any, capsys: Captured) -> None:
    name = module.__name__.rpartition(".")[2]
    assert run([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Example: {module.EXAMPLE.split()[0]} {name}" in shown
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert isinstance(command, click.Command)
    assert "--json" in {option for parameter in command.params for option in parameter.opts}
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name


def test_no_command_shows_help(capsys: Captured) -> None:
    assert run([]) == 2
    assert "Usage: finespun" in capsys.readouterr().out


# --- what was typed wrong ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ("'trian'", "'train'", "finespun --help")),
        (["train"], ("RECIPE", "finespun train --help")),
        (["train", "x.yaml", "--resum"], ("--resum", "--resume")),
        (["methods", "lrs"], ("'lrs'", "'lsr'")),
        (["predict", "out"], ("either texts or --file",)),
        (["export", "out", "./out"], ("name another folder",)),
        (["export", "out", "lora", "--rank", "0"], ("--rank", "0")),
    ],
)
def test_usage_errors(arguments: list[str], parts: tuple[str, ...], capsys: Captured) -> None:
    fails(arguments, 2, capsys, *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: [unclosed", ("bad.yaml, line", "not YAML")),
        ("just words", ("bad.yaml", "'just words'")),
        ("data: {builtin: trec}", ("bad.yaml", "model is missing")),
        (
            "model: minilm-l3\ndata: {builtin: trec}\ntrainin: {}",
            ("bad.yaml, line 3", "trainin is not a key", "'training'"),
        ),
        (
            "model: minilm-l3\ndata: {builtin: trec}\ntraining: {epochs: -1}",
            ("line 3", "training.epochs = -1", "greater than or equal to 1"),
        ),
        (
            "model: minilm-l3\ndata: {builtin: trec}\nstructure: {kind: lsr, rnk: 3}",
            ("line 3", "'rnk'", "'rank'"),
        ),
        ("model: minilm-l3\ndata: {builtin: terc}", ("no built-in data 'terc'", "'trec'")),
    ],
)
def test_wrong_recipes(text: str, parts: tuple[str, ...], tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text + f"\noutput: {tmp_path / 'out'}" if ":" in text else text)
    fails(["train", str(file)], 2, capsys, *parts)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_missing_names_its_neighbours(done: Path, capsys: Captured) -> None:
    fails(["train", str(done / "rn.yaml")], 3, capsys, "rn.yaml", "nearest: 'run.yaml'")


@pytest.mark.parametrize(
    ("override", "code", "parts"),
    [
        ("trainng.epochs=2", 2, ("trainng", "'training'")),
        ("training.epochs", 2, ("'training.epochs'", "section.key=value")),
        ("targets=[qurey]", 2, ("'qurey'", "'query'")),
        ("structure.rank=64", 2, ("rank=64", "16x16", "at most 16")),
        ("data.label=lable", 2, ("'lable'", "'label'")),
        ("data.file=no.csv", 3, ("'no.csv'",)),
        ("output=/proc/nowhere", 3, ("/proc/nowhere", "cannot be written")),
        ("training.lr=1e38", 4, ("in step", "try training.lr=3e+37", "training.warmup_share")),
    ],
)
def test_wrong_overrides(
    override: str, code: int, parts: tuple[str, ...], done: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = ["train", str(done / "run.yaml"), f"output={tmp_path / 'out'}", override, "-q"]
    fails([*arguments, "training.warmup_share=0.0"], code, capsys, *parts)


@pytest.mark.parametrize("command", ["evaluate", "inspect", "export", "predict"])
def test_folders_without_a_run(command: str, tmp_path: Path, capsys: Captured) -> None:
    more = {"export": [str(tmp_path / "lora")], "predict": ["a text"]}.get(command, [])
    fails([command, str(tmp_path / "nothing"), *more], 3, capsys, "nothing")


# --- errors that are nobody's typing -------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (StateError("it is merged"), 1, "it is merged"),
        (PermissionError(13, "Permission denied", "a/b"), 3, "a/b"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, part: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", broken)
    fails(["env"], code, capsys, part)


def test_exit_codes_are_those_of_the_documentation(capsys: Captured) -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "errors.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\d+) \| .* \| ?(.*?) ?\|$", page, re.MULTILINE)
    errors: dict[str, Any] = {**vars(all_errors), "Interrupted": Interrupted}
    told: set[str] = set()
    for code, names in table:
        for name in re.findall(r"`(\w+)`", names):
            told.add(name)
            expected = cli.INTERRUPTED if name == "Interrupted" else errors[name].exit_code
            assert expected == int(code), name
    assert told == {
        name for name, one in errors.items() if isinstance(one, type) and one.__doc__
    } - {"Iterable"}
    assert run(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split()).partition("Exit codes:")[2]
    assert re.findall(r"(\d+) [a-z]", shown) == [code for code, _ in table]
    assert (all_errors.FileError.exit_code, 5) == (cli.FILES, NO_RANKING)


def test_a_mistake_of_ours_keeps_its_traceback_in_a_file(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(["env"]) == 1
    (report,) = tmp_path.iterdir()
    assert str(report) in capsys.readouterr().err
    assert "ZeroDivisionError" in report.read_text()


def test_warnings_are_one_line(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(*arguments: Any, **options: Any) -> None:
        warnings.simplefilter("always")
        warnings.warn("mind the gap", stacklevel=1)

    monkeypatch.setattr(cli, "app", warns)
    assert run(["env"]) == 0
    assert capsys.readouterr().err == "warning: mind the gap\n"


# --- what each command prints --------------------------------------------------------------------
def test_train_prints_the_result(done: Path, tmp_path: Path, capsys: Captured) -> None:
    output = tmp_path / "out"
    assert run(["train", str(done / "run.yaml"), f"output={output}"]) == 0
    shown, result = capsys.readouterr(), Result.read(output)
    accuracy = f"{result.before['accuracy']:.4f} -> {result.after['accuracy']:.4f}"
    for part in (
        f"held-out accuracy   {accuracy}",
        f"{result.num_update_parameters:,} in 4 layers, 34 in modules trained whole",
        "16 steps in",
        f"{output} ({result.adapter_bytes:,} bytes of adapter)",
        "64 to train on, 16 held out",
        "peak memory",
    ):
        assert part in shown.out
    told = [json.loads(line) for line in shown.err.splitlines() if line.startswith("{")]
    assert [r["step"] for r in told if r["event"] == "step"] == list(range(1, 17))


def test_json_goes_to_stdout_with_the_result_last(
    done: Path, tmp_path: Path, capsys: Captured
) -> None:
    output = tmp_path / "out"
    assert run(["train", str(done / "run.yaml"), f"output={output}", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["when"] for r in told if r["event"] == "evaluation"] == ["before", "after"]
    last = told[-1]
    assert last.pop("event") == "result"
    assert Result(**last) == Result.read(output)


def test_quiet_prints_the_result_alone(done: Path, tmp_path: Path, capsys: Captured) -> None:
    arguments = ["train", str(done / "run.yaml"), f"output={tmp_path / 'out'}", "-q"]
    assert run(arguments) == 0
    first = capsys.readouterr()
    assert '"event"' not in first.err + first.out
    assert run([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out == first.out


def test_evaluate(done: Path, capsys: Captured) -> None:
    result = Result.read(done / "out")
    assert run(["evaluate", str(done / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result.after
    assert run(["evaluate", str(done / "out")]) == 0
    assert f"accuracy  {result.after['accuracy']:.4f}" in capsys.readouterr().out
    assert run(["evaluate", str(done / "out"), "--file", str(done / "table.csv")]) == 0
    fails(["evaluate", str(done / "out"), "--file", "no.csv"], 3, capsys, "no.csv")


def test_predict(done: Path, tmp_path: Path, capsys: Captured) -> None:
    assert run(["predict", str(done / "out"), "a lovely dog", "a grim ship", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["text"] for r in told] == ["a lovely dog", "a grim ship"]
    assert run(["predict", str(done / "out"), "a lovely dog"]) == 0
    label, share, text = capsys.readouterr().out.rstrip("\n").split("\t")
    assert (label, text) == (told[0]["label"], "a lovely dog")
    assert float(share) == pytest.approx(told[0]["probabilities"][label], abs=5e-4)
    assert run(["predict", str(done / "out"), "--file", str(done / "table.csv")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 80


def test_predict_numbers(tmp_path: Path, capsys: Captured) -> None:
    recipe = write_recipe(tmp_path, epochs=1)
    tiny_table(tmp_path / "table.csv", numbers=True)
    assert run(["train", str(recipe), "-q"]) == 0
    assert "held-out pearson" in capsys.readouterr().out
    assert run(["predict", str(tmp_path / "out"), "a lovely dog"]) == 0
    value, text = capsys.readouterr().out.rstrip("\n").split("\t")
    float(value)
    assert text == "a lovely dog"


def test_inspect(done: Path, capsys: Captured) -> None:
    result = Result.read(done / "out")
    assert run(["inspect", str(done / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["update parameters"] == result.num_update_parameters
    assert found["module parameters"] == result.num_module_parameters
    assert len(found["layers"]) == 4
    assert found["layers"][0].endswith("(16 x 16)")
    assert found["trained modules"] == ["classifier"]
    assert run(["inspect", str(done / "out")]) == 0
    shown = capsys.readouterr().out
    assert "LSR(" in shown
    assert f"update parameters  {result.num_update_parameters}" in shown


def test_compare_runs_of_two_methods(done: Path, tmp_path: Path, capsys: Captured) -> None:
    other = str(tmp_path / "lora")
    changes = ["structure={kind: lora, rank: 3}", f"output={other}", "training.epochs=1"]
    assert run(["train", str(done / "run.yaml"), *changes, "-q"]) == 0
    capsys.readouterr()
    assert run(["compare", str(done / "out"), other, "--json"]) == 0
    found, folders = json.loads(capsys.readouterr().out), (str(done / "out"), other)
    results = [Result.read(folder) for folder in folders]
    for key in (
        "num_update_parameters",
        "num_module_parameters",
        "adapter_bytes",
        "steps",
        "loss",
        "seconds",
    ):
        assert found["runs"][key] == [getattr(one, key) for one in results]
    assert found["runs"]["steps"] == [16, 8]
    for metric in results[0].after:
        assert found["runs"][f"{metric} before"] == [one.before[metric] for one in results]
        assert found["runs"][f"{metric} after"] == [one.after[metric] for one in results]
    assert len(found["sites"]) == 4
    a, b = (Trained.open(folder).adapter.updates() for folder in folders)
    for site in found["sites"]:
        x, y = (updates[site["name"]].dense().double() for updates in (a, b))
        assert site["norm_a"] == pytest.approx(float(x.norm()), rel=1e-5)
        assert site["norm_b"] == pytest.approx(float(y.norm()), rel=1e-5)
        assert site["cosine"] == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-5)
    assert run(["compare", *folders]) == 0
    shown = capsys.readouterr().out
    cells = [f"{one.num_update_parameters:,}" for one in results]
    assert re.search(rf"^num_update_parameters +{cells[0]} +{cells[1]}$", shown, re.MULTILINE)
    assert re.search(r"^steps +16 +8$", shown, re.MULTILINE)


def test_export_is_exact_and_can_be_inspected(done: Path, tmp_path: Path, capsys: Captured) -> None:
    out = str(tmp_path / "lora")
    assert run(["export", str(done / "out"), out]) == 0
    assert "LoRA of rank 2 at 4 layers, exact" in capsys.readouterr().out
    assert run(["inspect", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["update parameters"] == 4 * LoRA(rank=2).num_parameters(
        finespun.contract.SiteShape("any", 16, 16)
    )
    assert run(["export", str(done / "out"), str(tmp_path / "one"), "--rank", "1"]) == 0
    assert "relative error up to" in capsys.readouterr().out
    assert run(["export", str(done / "out"), str(tmp_path / "two"), "--rank", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rank"] == 1
    assert told["error"] == max(told["errors"].values()) > 0
    assert told["folder"] == str(tmp_path / "two")
    refused = ["export", str(done / "out"), str(tmp_path / "no"), "--rank", "1", "--max-error"]
    fails([*refused, "1e-9"], 2, capsys, "error")


def test_init_writes_a_recipe_that_trains(tmp_path: Path, capsys: Captured) -> None:
    model = tiny_model(tmp_path / "model")
    table = tiny_table(tmp_path / "table.csv")
    assert run(["init", str(table), str(model)]) == 0
    text = capsys.readouterr().out
    assert run(["init", str(table), str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == yaml.safe_load(text)
    recipe = tmp_path / "new.yaml"
    assert run(["init", str(table), str(model), "--out", str(recipe)]) == 0
    assert capsys.readouterr().out == f"{recipe} written. Next: finespun train {recipe}\n"
    assert recipe.read_text() == text
    fails(["init", str(table), str(model), "--out", str(recipe)], 2, capsys, "--overwrite")
    assert run(["init", str(table), str(model), "--out", str(recipe), "--overwrite"]) == 0
    changes = [f"output={tmp_path / 'out'}", "training.epochs=1"]
    assert run(["train", str(recipe), *changes, "-q"]) == 0
    fails(["init", str(tmp_path / "tabel.csv"), str(model)], 3, capsys, "nearest: 'table.csv'")


def test_methods(capsys: Captured) -> None:
    assert run(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {kind for axis in AXES.values() for kind in axis.known}
    assert found["lora"]["num_parameters"] == 24 * 8 * 2 * 768
    assert found["lsr"]["num_parameters"] == 24 * 3584
    assert run(["methods"]) == 0
    shown = capsys.readouterr().out
    for kind, facts in found.items():
        axis = "" if facts["axis"] == "structure" else f"{facts['axis']}, "
        assert f"{kind}  ({axis}{facts['source']})" in shown
        assert facts["formula"] in shown
    assert run(["methods", "lsr"]) == 0
    assert "separation_rank: 16" in capsys.readouterr().out


def test_env(capsys: Captured) -> None:
    assert run(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finespun"] == finespun.__version__
    assert found["python"] == sys.version.split()[0]
    assert found["devices"].startswith("cpu")
    assert run(["env"]) == 0
    assert f"torch         {found['torch']}" in capsys.readouterr().out
