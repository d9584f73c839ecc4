"""HTML by hand: a document, its sections, tables and notes. All text is escaped."""

import math
from collections.abc import Collection, Iterable, Sequence
from html import escape
from importlib import resources

import finespun

Cell = str | int | float | None
GENERATOR = f"Finespun {finespun.__version__}"


def document(title: str, lead: str, sections: Iterable[str]) -> str:
    """A whole page that needs no other file; `sections` are HTML, the rest is text."""
    style = resources.files("finespun.report").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="{escape(GENERATOR)}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#content">Skip to the content</a>\n'
        f'<header><h1>{escape(title)}</h1>\n<p class="soft">{escape(lead)}</p></header>\n'
        f'<main id="content">\n{body}\n</main>\n'
        f'<footer><p class="soft">Written by {escape(GENERATOR)} from the files in this folder.'
        "</p></footer>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A part of the page under a heading; empty parts are left out, and the whole if all are."""
    held = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{held}\n</section>" if held else ""


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def code(text: str, label: str) -> str:
    """Text as it is, in a region that keys can scroll."""
    return f'<pre tabindex="0" role="region" aria-label="{escape(label)}">{escape(text)}</pre>'


def folded(title: str, *parts: str) -> str:
    """Parts that open on request."""
    return f"<details>\n<summary>{escape(title)}</summary>\n{''.join(parts)}\n</details>"


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    caption: str,
    bars: Collection[int] = (),
) -> str:
    """A table in a region that keys can scroll; its first column names the rows.

    Columns in `bars` hold shares in 0..1, drawn as bars beside the figures that they repeat.
    """
    held = [list(row) for row in rows]
    if not held:
        return ""
    columns = ""
    for place, head in enumerate(heads):
        numeric = place > 0 and any(isinstance(row[place], int | float) for row in held)
        kind = "wide" if place in bars else "number" if numeric else "text"
        columns += f'<th scope="col" class="{kind}">{escape(head)}</th>'
    body = ""
    for row in held:
        cells = (_cell(value, place, place in bars) for place, value in enumerate(row))
        body += f"<tr>{''.join(cells)}</tr>\n"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n"
        f"<tbody>\n{body}</tbody>\n</table>\n</div>"
    )


def _cell(value: Cell, place: int, bar: bool) -> str:
    if place == 0:
        return f'<th scope="row">{escape(shown(value))}</th>'
    if bar:
        width = 0.0 if not isinstance(value, int | float) else 100 * min(max(value, 0.0), 1.0)
        return f'<td><span class="bar" style="width:{width:.1f}%" aria-hidden="true"></span></td>'
    kind = ' class="number"' if isinstance(value, int | float | None) else ""
    return f"<td{kind}>{escape(shown(value))}</td>"


def shown(value: Cell) -> str:
    """A value as text: thousands apart, four digits, a dash for what is not known.

    >>> shown(12345), shown(0.123456), shown(None)
    ('12,345', '0.1235', '–')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
