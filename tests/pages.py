"""`make pages`: the report of every folder in docs/results, opened in headless Chromium.

At 1280 and 390 pixels each page must open without a console message, without scrolling sideways,
and be usable by keyboard; every figure must equal the files that the page was made from. Pictures
are kept in the folder given (out/pages).
"""

import argparse
import csv
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import chromium

from finespun.bench.run import SHEET
from finespun.report import report
from finespun.report.page import shown
from finespun.training.output import LOG, RESULT

RESULTS = Path(__file__).parent.parent / "docs" / "results"
WIDTHS = (1280, 390)
CELLS = "[...document.querySelectorAll('th, td')].map(e => e.textContent)"
REACHABLE = "document.querySelectorAll('a, summary, [tabindex=\"0\"]').length"
FOLDED = "document.querySelectorAll('details [tabindex=\"0\"]').length"


def folders() -> list[Path]:
    """The folders of finished runs and benches."""
    return sorted(p for p in RESULTS.iterdir() if (p / LOG).is_file() or (p / SHEET).is_file())


def figures(folder: Path) -> list[str]:
    """What the page must show: the figures in the files, as it writes them."""
    if (folder / RESULT).is_file():
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        found = [v for key in ("before", "after") for v in result.get(key, {}).values()]
        return [shown(value) for value in found if isinstance(value, float)]
    with (folder / SHEET).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {"num_update_parameters": int, "mean": float, "half_interval_95": float}
    return [shown(kind(row[key])) for row in rows for key, kind in kinds.items() if row[key]]


def faults(folder: Path, work: Path, pictures: Path | None) -> list[str]:
    """What is wrong with the page of one folder; `work` is an empty folder."""
    copy = work / folder.name
    shutil.copytree(folder, copy)
    found = []
    with chromium.opened(report(copy), work / "profile") as tab:
        for width in WIDTHS:
            tab.resize(width)
            if (wide := tab.run("document.documentElement.scrollWidth")) > width:
                found.append(f"{folder.name} at {width}: {wide} pixels wide")
            if pictures is not None:
                tab.picture(pictures / f"{folder.name}-{width}.png")
        cells = set(tab.run(CELLS))
        found += [f"{folder.name}: {f} is not shown" for f in figures(folder) if f not in cells]
        reached = [tab.press_tab() for _ in range(tab.run(REACHABLE) - tab.run(FOLDED))]
        if "BODY." in reached:
            found.append(f"{folder.name}: the keyboard reaches {reached.index('BODY.')} places")
        found += [f"{folder.name}: {complaint}" for complaint in tab.complaints]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every page; 1 where one has a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, default=Path("out/pages"))
    pictures = parser.parse_args(arguments).pictures
    if chromium.CHROMIUM is None:
        print("there is no chromium on the path")
        return 1
    pictures.mkdir(parents=True, exist_ok=True)
    every = []
    for folder in folders():
        with tempfile.TemporaryDirectory() as work:
            found = faults(folder, Path(work), pictures)
        print(f"{folder.name}: {'; '.join(found) or 'fine'}", flush=True)
        every += found
    return int(bool(every))


if __name__ == "__main__":
    sys.exit(main())
