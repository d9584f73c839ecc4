"""`finespun train`: carry out a recipe."""

import json
import math
import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from finespun.cli.screen import echo

if TYPE_CHECKING:
    from finespun.training.estimate import Estimate
    from finespun.training.output import Result
    from finespun.training.progress import Reporter

EXAMPLE = "finespun train examples/trec-lsr-small.yaml training.epochs=1 output=out/short"


def command(
    recipe: Annotated[str, typer.Argument(help="A recipe file in YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to change, as section.key=value.", metavar="[KEY=VALUE]..."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that the output folder holds.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would be trained, memory and time; write nothing."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print progress and result as JSON lines.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone.")] = False,
) -> None:
    """Train an adapter as a recipe says, measure it on held-out data and save it."""
    from finespun.errors import InputError
    from finespun.recipes.recipe import Recipe
    from finespun.training.loop import Interrupted
    from finespun.training.run import run

    changes = overrides or []
    if dry_run:
        from finespun.training.estimate import estimate

        if resume or overwrite:
            raise InputError("--dry-run writes nothing: leave out --resume and --overwrite")
        found = estimate(Recipe.load(recipe, changes), choose_reporter(False, quiet))
        echo(found.as_json() if as_json else foretell(found))
        return
    try:
        reporter = choose_reporter(as_json, quiet)
        result = run(Recipe.load(recipe, changes), resume, reporter, overwrite)
    except Interrupted as error:
        again = shlex.join(["finespun", "train", recipe, *changes, "--resume"])
        echo(f"{error}; a checkpoint is saved. Go on with:\n  {again}", err=True)
        raise typer.Exit(130) from error
    if as_json:
        echo(json.dumps({"event": "result", **json.loads(result.as_json())}))
    else:
        echo(describe(result))


def choose_reporter(as_json: bool, quiet: bool) -> "Reporter":
    """A bar on a terminal, JSON lines on stderr elsewhere and on stdout if asked, or nothing."""
    from finespun.training.progress import Bar, JsonLines, Reporter

    if quiet:
        return Reporter()
    if as_json:
        return JsonLines(sys.stdout)
    return Bar() if sys.stderr.isatty() else JsonLines(sys.stderr)


def describe(result: "Result") -> str:
    """The result as a few lines of text."""
    lines = [
        (f"held-out {name}", f"{shown(result.before[name])} -> {shown(after)}")
        for name, after in result.after.items()
    ]
    lines += [
        ("rows", f"{result.train_rows:,} to train on, {result.test_rows:,} held out"),
        (
            "trained parameters",
            f"{result.num_update_parameters:,} in {result.sites} layers, "
            f"{result.num_module_parameters:,} in modules trained whole",
        ),
        ("training", f"{result.steps:,} steps in {result.seconds:.1f} s, loss {result.loss:.4f}"),
        ("peak memory", f"{result.peak_memory / 1e6:,.0f} MB, {result.threads} threads"),
        ("saved", f"{result.output} ({result.adapter_bytes:,} bytes of adapter)"),
    ]
    return aligned(lines)


def foretell(found: "Estimate") -> str:
    """An estimate as a few lines of text."""
    shapes = sorted({f"{s.out_features} x {s.in_features}" for s in found.targets})
    leaves = sorted({s.name.rpartition(".")[2] for s in found.targets})
    where = f": {', '.join(leaves)} ({', '.join(shapes)})" if found.targets else ""
    parts = (
        f"weights {megabytes(found.weights)}, activations {megabytes(found.activations)}, "
        f"gradients and optimiser {megabytes(found.optimiser)}"
    )
    lines = [
        ("targets", f"{len(found.targets)} layers{where}"),
        ("trained whole", ", ".join(found.modules) or "nothing"),
        (
            "trained parameters",
            f"{found.num_update_parameters:,} in layers, "
            f"{found.num_module_parameters:,} in modules",
        ),
        ("adapter", f"{found.adapter_bytes:,} bytes"),
        ("rows", f"{found.train_rows:,} to train on, {found.test_rows:,} held out"),
        ("memory, about", f"{megabytes(found.memory)} on {found.device}: {parts}"),
        (
            "a step, about",
            f"{found.flops / 1e9:,.2f} billion operations for {found.tokens:,} tokens; "
            f"{found.update_flops / 1e9:,.3f} in the updates, forwards",
        ),
        (
            "time, about",
            f"{found.seconds:,.1f} s for {found.steps:,} steps, {found.measuring:,.1f} s to "
            "measure before and after; loading and saving come on top",
        ),
    ]
    return aligned(lines)


def aligned(lines: list[tuple[str, str]]) -> str:
    """Names and texts in two columns."""
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def megabytes(count: int) -> str:
    """Bytes as MB, small ones with digits after the point."""
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:,.3f} MB"


def shown(value: float | None) -> str:
    """A metric with four digits; metrics.json has null for one that is not a number."""
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"
