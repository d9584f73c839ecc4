"""Recognise what lies in a folder, and read it."""

from pathlib import Path

from finespun.errors import FileError
from finespun.files import native
from finespun.files.atomic import settled
from finespun.files.native import Saved


def read_adapter(folder: str | Path, strict: bool = True) -> Saved:
    """The adapter in a folder of Finespun's or of PEFT's.

    Where both lie in one folder, Finespun's is read. Raises FileError where there is neither.
    """
    place = settled(folder)
    if (place / native.CONFIG).is_file():
        return native.read(place, strict)
    if not place.is_dir():
        raise FileError(f"{place} is no folder")
    below = sorted(p.name for p in place.iterdir() if (p / native.CONFIG).is_file())
    hint = f"; below it lie {', '.join(below)}" if below else ""
    raise FileError(f"{place} holds neither {native.CONFIG}{hint}")
