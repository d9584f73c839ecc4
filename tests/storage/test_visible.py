"""What is shown of foreign text: nothing obeyed by a terminal, nothing but text in Markdown."""

import json
import re
import sys
import unicodedata

import pytest

from finespun.storage.visible import code_block, code_span, markdown, one_line, visible

EVIL = (
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\rb",
    "a\x08b",
    "\u202eltr",
    "\ud800",
    "<script>x</script>",
    "`` ` ``",
    "![x](y)",
    "a | b",
    "# head\n# other",
    "",
)


def test_every_control_is_spelt_out_and_every_letter_kept() -> None:
    for number in range(sys.maxunicode + 1):
        char = chr(number)
        kind = unicodedata.category(char)
        if kind in ("Cc", "Cs", "Zl", "Zp") and char not in "\n\t":
            assert visible(char) == f"\\u{number:04x}"
        elif kind[0] in "LNPSM":
            assert visible(char) == char


@pytest.mark.parametrize("text", EVIL)
def test_json_says_the_same_after_it(text: str) -> None:
    line = json.dumps({text: text}, ensure_ascii=False)
    assert json.loads(visible(line)) == {text: text}


@pytest.mark.parametrize("text", EVIL)
def test_markdown_is_one_line_of_text(text: str) -> None:
    shown = markdown(text)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)[<>|`*\[\]]", shown)
    assert re.sub(r"\\([`*\[\]<>|~&\\])", r"\1", shown) == one_line(text)


@pytest.mark.parametrize("text", EVIL)
def test_code_stays_inside_its_fence(text: str) -> None:
    span = code_span(text)
    fence = re.match("`+", span)
    assert fence is not None
    inner = span[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inner)
    first, *lines, last = code_block(text, "yaml")
    assert first == f"{last}yaml"
    assert all(last not in line for line in lines)
