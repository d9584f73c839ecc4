"""Text of unknown origin made safe to show: on a terminal, in Markdown, on one line."""

import re

# C0 and C1 controls but tab and line feed, line breaks of Unicode, overrides of the direction of
# writing, lone surrogates
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKUP = re.compile(r"([\\`*\[\]<>|~&])")


def visible(text: str) -> str:
    r"""The text with every character that a terminal obeys written out as JSON does; what JSON
    escapes means the same after it.

    >>> visible("a\x1b[31mb")
    'a\\u001b[31mb'
    """
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """Visible text with line feeds and tabs as spaces."""
    return visible(" ".join(text.split()))


def markdown(text: str) -> str:
    """One line of Markdown that shows the text and is nothing but text."""
    return _MARKUP.sub(r"\\\1", one_line(text))


def code_span(text: str) -> str:
    """One line of Markdown that shows the text as code, whatever backticks it holds."""
    line = one_line(text)
    fence = "`" * (1 + _longest_run(line))
    pad = " " if "`" in line or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(text: str, language: str) -> list[str]:
    """Lines of Markdown that show the text as a block of code."""
    fence = "`" * max(4, 1 + _longest_run(text))
    return [f"{fence}{language}", visible(text), fence]


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
