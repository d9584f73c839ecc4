"""`finespun bench`: compare members at their own best learning rates."""

import json
import shlex
from typing import Annotated

import typer

from finespun.cli.screen import echo

EXAMPLE = "finespun bench examples/demo.yaml"
NO_RANKING = 5


def command(
    file: Annotated[str, typer.Argument(help="A bench file in YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to change, as section.key=value.", metavar="[KEY=VALUE]..."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the table as one JSON object.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the table alone.")] = False,
) -> None:
    """Sweep learning rates and seeds and compare members, each at its own best, with intervals.

    Trials that results.jsonl in the output folder holds are not run again, so an interrupted bench
    goes on where it stood. Exit code 5: done, but a best one lies at the edge of its grid or a run
    diverged, so there is no ranking.
    """
    import scipy.stats  # noqa: F401  # missing, it is told now and not after the last trial
    from rich.console import Console

    from finespun.bench import Bench, BenchSpec
    from finespun.bench.tables import show

    changes = overrides or []
    made_by = shlex.join(["finespun", "bench", file, *changes])

    def tell(line: str) -> None:
        if not quiet:
            echo(line, err=True)

    bench = Bench(BenchSpec.load(file, changes), made_by, tell)
    try:
        summary = bench.run()
    except KeyboardInterrupt as error:
        kept = f"interrupted; {len(bench.results)} finished trials are kept"
        echo(f"{kept}. Go on with:\n  {made_by}", err=True)
        raise typer.Exit(130) from error
    if as_json:
        echo(json.dumps(summary.as_json()))
    else:
        show(summary, Console())
        echo(f"Written to {bench.folder}: results.jsonl, table.md, table.csv, picture.*")
    if summary.refusal is not None:
        raise typer.Exit(NO_RANKING)
