"""The one door to the terminal: nothing that a file says is obeyed by it."""

import typer

from finespun.storage.visible import visible


def echo(text: object = "", err: bool = False, nl: bool = True, bold: bool = False) -> None:
    """Print text of any origin; control characters are written out."""
    shown = visible(str(text))
    typer.echo(typer.style(shown, bold=True) if bold else shown, err=err, nl=nl)


def flagged(flag: str, colour: str, text: object) -> None:
    """Print `flag: text` on stderr, the flag in a colour."""
    typer.echo(f"{typer.style(f'{flag}:', fg=colour, bold=True)} {visible(str(text))}", err=True)
