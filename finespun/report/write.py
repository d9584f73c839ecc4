"""From a folder to report.html in it."""

from pathlib import Path

from finespun.errors import FileError
from finespun.report.run import run_page
from finespun.storage.atomic import settled, write_file
from finespun.training.output import LOG

PAGE = "report.html"


def report(folder: str | Path) -> Path:
    """Write report.html into the output folder of a run or of a bench; returns its path.

    The page stands alone: no script, no font, nothing fetched. It is made of the files in the
    folder; no model is loaded. Raises FileError where the folder holds neither a run nor a bench,
    or a file of it cannot be read.
    """
    place = settled(folder)
    page = run_page(place) if (place / LOG).is_file() else _of_bench(place)
    write_file(place / PAGE, page)
    return Path(folder).expanduser() / PAGE


def _of_bench(place: Path) -> str:
    """The page of a bench, whose packages a run's page does without."""
    from finespun.bench.run import SHEET
    from finespun.report.bench import bench_page

    if (place / SHEET).is_file():
        return bench_page(place)
    why = "is no folder" if not place.is_dir() else "holds no run and no finished bench"
    raise FileError(f"{str(place)!r} {why}: neither {LOG} nor {SHEET} is in it")
