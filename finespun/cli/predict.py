"""`finespun predict`: ask a trained adapter about new texts."""

from typing import Annotated

import typer

from finespun.cli.screen import echo

EXAMPLE = 'finespun predict out/trec-lsr-small "Who wrote Dracula?" "Where is Ulm?"'


def command(
    adapter: Annotated[str, typer.Argument(help="The output folder of a finished run.")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts, each in quotes.", metavar="[TEXT]...")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(help="A table with the recipe's text columns, or .txt with a text a line."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Print what an adapter says about each text: a class and its probability, or a number."""
    from finespun.errors import InputError
    from finespun.training.inference import Trained
    from finespun.training.progress import as_json as line

    if bool(texts) == (file is not None):
        raise InputError("give either texts or --file")
    trained = Trained.open(adapter)
    found = trained.predict(texts or []) if file is None else trained.predict_file(file)
    for item in found:
        text = " ".join(item.text.split())  # one line for each
        if as_json:
            echo(line(vars(item)))
        elif item.label is None:
            echo(f"{item.value:.4f}\t{text}")
        elif item.label not in item.probabilities:
            echo(f"{' '.join(item.label.split())}\t{text}")
        else:
            echo(f"{item.label}\t{item.probabilities[item.label]:.3f}\t{text}")
