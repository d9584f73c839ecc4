"""The table of what each method can do is what trying it gives."""

import importlib
from pathlib import Path

import pytest

from finespun.methods.structures import STRUCTURES

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "capabilities.md").read_text(encoding="utf-8")


def test_every_method_has_its_row():
    rows = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(STRUCTURES)


def test_every_number_has_its_reason():
    reasons = PAGE.partition("## Reasons")[2].strip().splitlines()
    cited = {cell.partition("]")[0] for cell in PAGE.split("[")[1:] if "](#reasons)" in cell}
    assert cited == {line.partition(".")[0] for line in reasons}


@pytest.mark.slow
def test_the_page_is_what_trying_gives(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "hooks")
    script = importlib.import_module("capabilities")
    assert script.page(script.found(script.kinds())) == PAGE
