"""Recognise what lies in a folder, and read it."""

from pathlib import Path

from finespun.errors import FileError
from finespun.files import native, peft
from finespun.files.atomic import settled
from finespun.files.native import Saved


def read_adapter(folder: str | Path, strict: bool = True) -> Saved:
    """The adapter in a folder of Finespun's or of PEFT's.

    Where both lie in one folder, Finespun's is read. Raises FileError where there is neither.
    """
    place = settled(folder)
    if (place / native.CONFIG).is_file():
        return native.read(place, strict)
    if (place / peft.CONFIG).is_file():
        return peft.read_peft(place, strict)
    if not place.is_dir():
        raise FileError(f"{place} is no folder")
    names = native.CONFIG, peft.CONFIG
    below = sorted(p.name for p in place.iterdir() if any((p / n).is_file() for n in names))
    hint = f"; its folders {', '.join(below[:5])} do" if below else ""
    raise FileError(f"{place} holds neither {names[0]} nor {names[1]}{hint}")
