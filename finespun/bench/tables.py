"""The summary as a table: on a terminal, in Markdown and in CSV."""

import csv
import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from finespun.bench.summary import Row, Summary, cells

COLUMNS = (
    "parameters: trained in the layers, without the head's {head}; bytes: the adapter's tensors in "
    "a file, with the head; lr: the best of those tried; seconds: in training steps, mean of runs."
)
NOTE = (
    "± is half the 95 % interval of the mean over {runs} seeds (Student's t). It covers the draw "
    "of the head, the structure and the order of rows, on the same {rows:,} held-out rows."
)


def heads(summary: Summary) -> list[str]:
    """Column heads of the printed table."""
    ranked = ["rank"] if summary.ranking else []
    return [*ranked, "member", "parameters", "bytes", "lr", summary.metric, "seconds", "CPU s"]


def lines(summary: Summary) -> list[list[str]]:
    """The printed table, one list of texts a member."""
    places = {row.name: str(place) for place, row in enumerate(summary.ranking, start=1)}
    return [
        [
            *([places[row.name]] if places else []),
            row.name,
            f"{row.num_update_parameters:,}",
            f"{row.bytes:,}",
            _rate(row),
            _score(row.mean, row.half),
            f"{row.seconds:.1f}",
            f"{row.cpu_seconds:.1f}",
        ]
        for row in summary.rows
    ]


def remarks(summary: Summary) -> list[str]:
    """What belongs under the table, the command that made it last."""
    trained = sorted({row.num_module_parameters for row in summary.rows})
    told = [COLUMNS.format(head=" or ".join(f"{count:,}" for count in trained))]
    told += [NOTE.format(runs=len(summary.seeds), rows=summary.test_rows)]
    for gap in summary.differences:
        sure = gap.half is not None and abs(gap.mean) > gap.half
        told.append(
            f"At {gap.budget:,} parameters: {gap.first} − {gap.second} = {gap.mean:+.4f}"
            + ("" if gap.half is None else f" ± {gap.half:.4f}")
            + (", paired by seed" if sure else ", paired by seed: not distinguishable")
        )
    if summary.refusal is not None:
        told.append(summary.refusal[0].upper() + summary.refusal[1:] + ".")
    return [*told, f"Made by: {summary.command}"]


def show(summary: Summary, console: Console) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for head in heads(summary):
        table.add_column(head, justify="left" if head == "member" else "right", no_wrap=True)
    for line in lines(summary):
        table.add_row(*line)
    console.print(table)
    for remark in remarks(summary):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)


def markdown(summary: Summary) -> str:
    """The table as Markdown, with its remarks."""
    rule = [":---" if head == "member" else "---:" for head in heads(summary)]
    body = "".join(_line(line) for line in (heads(summary), rule, *lines(summary)))
    *told, command = remarks(summary)
    paragraphs = "".join(f"{remark}\n\n" for remark in told)
    return f"{body}\n{paragraphs}{command.replace(summary.command, f'`{summary.command}`')}\n"


def csv_text(summary: Summary) -> str:
    """Every value at full precision, one line a member; the command in the last column."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = list(cells(summary.rows[0]))
    seeds = [f"{summary.metric}_seed_{seed}" for seed in summary.seeds]
    writer.writerow([*names, *seeds, "command"])
    for row in summary.rows:
        values = [*cells(row).values(), *row.scores, summary.command]
        writer.writerow(["" if value is None else value for value in values])
    return stream.getvalue()


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |\n"


def _rate(row: Row) -> str:
    if row.lr is None:
        return "all diverged"
    return f"{row.lr:g}" + (" (edge)" if row.at_edge else "")


def _score(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "diverged"
    return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")
