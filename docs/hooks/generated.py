"""MkDocs hook: what the code says of itself is written into the pages that ask for it.

Run, it writes the tables into the pages below docs/, so that they can be read without the site; a
test holds them against the code.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer
from pydantic import BaseModel

from finespun.cli.app import app
from finespun.cli.methods import facts
from finespun.contract import Method, Structure
from finespun.errors import InputError
from finespun.methods.axes import AXES, STRUCTURE
from finespun.methods.composition import suits
from finespun.methods.structures import STRUCTURES
from finespun.recipes.recipe import Recipe


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every mark by what it asks for."""
    return filled(markdown.replace(REFERENCE, method_reference()))


def filled(markdown: str) -> str:
    """The page with what every mark asks for right below it, up to the mark of its end."""
    for mark, write in WRITERS.items():
        if mark in markdown:
            old = re.compile(re.escape(mark) + rf"(?:\n.*?{re.escape(END)})?", re.DOTALL)
            new = f"{mark}\n\n{write()}\n\n{END}"
            markdown = old.sub(lambda _, new=new: new, markdown)
    return markdown


def methods() -> list[tuple[str, Any]]:
    """Kind and class of every structure, LSR first."""
    return sorted(STRUCTURES.items(), key=lambda item: (item[0] != "lsr", item[0]))


def method_table() -> str:
    """Name, formula, count and source of every structure."""
    rows = ["| name | update | parameters | source |", "| --- | --- | ---: | --- |"]
    for kind, cls in methods():
        fact = facts(cls())
        formula = cell(str(fact["formula"]))
        rows.append(f"| `{kind}` | {formula} | {fact['num_parameters']:,} | {fact['source']} |")
    return "\n".join(rows)


def others() -> list[Method]:
    """Every value of the axes beside the structure, by its defaults; in the order of their names,
    not of their imports."""
    axes = [axis for axis in AXES.values() if axis is not STRUCTURE]
    return [axis.known[kind]() for axis in axes for kind in sorted(axis.known)]


def axis_table() -> str:
    """What the axes ask, and the values that they have."""
    rows = ["| axis | question | values |", "| --- | --- | --- |"]
    for axis in AXES.values():
        known = sorted(axis.known)
        told = f"{len(known)}, above" if axis is STRUCTURE else ", ".join(f"`{k}`" for k in known)
        rows.append(f"| `{axis.name}` | {axis.question} | {told or 'none yet'} |")
    return "\n".join(rows)


def composition_table() -> str:
    """Which structures each value of another axis goes with, and what it needs."""
    rows = ["| value | needs | goes with |", "| --- | --- | --- |"]
    for value in others():
        fit = [f"`{kind}`" for kind, cls in methods() if goes(value, cls())]
        told = "every structure" if len(fit) == len(methods()) else ", ".join(fit)
        rows.append(f"| `{value.kind}` | {', '.join(sorted(value.needs))} | {told} |")
    return "\n".join(rows)


def goes(value: Method, structure: Structure) -> bool:
    """Whether a recipe may have both."""
    try:
        suits(value, structure)
    except InputError:
        return False
    return True


def method_reference() -> str:
    """The docstring and options of every method."""
    every = [cls for _, cls in methods()] + [type(value) for value in others()]
    return "\n\n".join(f"::: {cls.__module__}.{cls.__name__}" for cls in every)


def recipe_keys() -> str:
    """Every key of a recipe with its default and its meaning."""
    rows = ["| key | default | what it is |", "| --- | --- | --- |"]
    for key, default, about in keys(Recipe, ""):
        rows.append(f"| `{key}` | {default} | {cell(about)} |")
    return "\n".join(rows)


def keys(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Dotted key, default and description of every field that is no section itself."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if inspect.isclass(inner) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{prefix}{name}.")
        elif field.is_required():
            yield f"{prefix}{name}", "required", field.description or ""
        elif name == "structure":
            yield f"{prefix}{name}", "`{kind: lsr}`", field.description or ""
        else:
            shown = "null" if field.default is None else str(field.default).lower()
            yield f"{prefix}{name}", f"`{shown}`", field.description or ""


def commands() -> str:
    """Help, usage, options and example of every command."""
    group = typer.main.get_command(app)
    context = click.Context(group, info_name="finespun")
    parts = []
    for name, command in group.commands.items():
        usage = command.collect_usage_pieces(click.Context(command, parent=context))
        example = (command.epilog or "").removeprefix("Example: ")
        rows = [
            f"| `{parameter.human_readable_name if argument else ', '.join(parameter.opts)}` "
            f"| {cell(getattr(parameter, 'help', None) or '')} |"
            for parameter in command.params
            if (argument := isinstance(parameter, click.Argument)) or "--help" not in parameter.opts
        ]
        parts += [
            f"## {name}",
            inspect.cleandoc(command.help or ""),
            f"Usage: `finespun {name} {' '.join(usage)}`",
            "\n".join(["| argument | what it is |", "| --- | --- |", *rows]) if rows else "",
            f"Example: `{example}`",
        ]
    return "\n\n".join(parts)


def cell(text: str) -> str:
    """Text that fits one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


REFERENCE, END = "<!-- reference of methods -->", "<!-- end -->"
WRITERS = {
    "<!-- table of methods -->": method_table,
    "<!-- table of axes -->": axis_table,
    "<!-- what goes together -->": composition_table,
    "<!-- keys of a recipe -->": recipe_keys,
    "<!-- commands -->": commands,
}


if __name__ == "__main__":
    for page in sorted((Path(__file__).parent.parent).glob("*.md")):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
