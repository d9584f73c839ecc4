"""MkDocs hook: the page of methods is written from the registry, counts included."""

from typing import Any

from finespun.cli.methods import facts
from finespun.structures import STRUCTURES

TABLE, REFERENCE = "<!-- table of methods -->", "<!-- reference of methods -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table and the reference where the page asks for them."""
    if TABLE not in markdown:
        return markdown
    found = sorted(STRUCTURES.items(), key=lambda item: (item[0] != "lsr", item[0]))
    rows = ["| name | update | numbers | source |", "| --- | --- | ---: | --- |"]
    for kind, cls in found:
        fact = facts(cls())
        formula = " ".join(str(fact["formula"]).split()).replace("|", "\\|")
        rows.append(f"| `{kind}` | {formula} | {fact['numbers']:,} | {fact['source']} |")
    reference = "\n\n".join(f"::: {cls.__module__}.{cls.__name__}" for _, cls in found)
    return markdown.replace(TABLE, "\n".join(rows)).replace(REFERENCE, reference)
