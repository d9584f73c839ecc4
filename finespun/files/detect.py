"""Recognise what lies in a folder, and read it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from finespun.errors import FileError, InputError, StrictError
from finespun.files import native
from finespun.files.diffusion import read as diffusion
from finespun.files.diffusion.names import Unplaced, layers_of, place_on
from finespun.files.peft import read as peft
from finespun.files.peft.methods import Layers, read_method
from finespun.files.saved import Saved
from finespun.storage.atomic import located, settled

MARKERS = native.CONFIG, peft.CONFIG, diffusion.WEIGHTS


def find_adapter(folder: str | Path) -> Path:
    """The file or folder to read an adapter from. Raises FileError where there is none."""
    place = settled(folder)
    if place.is_file() or any((place / name).is_file() for name in MARKERS):
        return place
    if not place.is_dir():
        raise FileError(f"{place} is no folder and no file")
    below = sorted(p.name for p in place.iterdir() if any((p / n).is_file() for n in MARKERS))
    hint = f"; its folders {', '.join(below[:5])} do" if below else ""
    if single := sorted(p.name for p in place.glob("*.safetensors")):
        hint += f"; for an adapter in one file name the file, such as {place / single[0]}"
    raise FileError(f"{place} holds neither {MARKERS[0]} nor {MARKERS[1]}{hint}")


def check_source(src: str | Path, dst: str | Path) -> None:
    """Raise FileError where `src` holds no adapter, InputError where `dst` is the same place."""
    if located(src) == located(dst):
        raise InputError(f"{str(dst)!r} is the adapter itself; name another folder")
    find_adapter(src)


def read_adapter(
    folder: str | Path, strict: bool = True, layers: nn.Module | Layers | None = None
) -> Saved:
    """The adapter in a folder of Finespun's, PEFT's or diffusers', or in a single file of
    diffusers' or kohya's, whose names `read_for` then finds in a model.

    PEFT's methods other than LoRA are read with `layers`, those of the model. Where several lie in
    one folder, the first of these is read. Raises FileError where there is none.
    """
    place = find_adapter(folder)
    if place.is_file():
        return diffusion.read_diffusion(place, strict)
    if (place / native.CONFIG).is_file():
        return native.read(place, strict)
    if (place / peft.CONFIG).is_file():
        base = layers if isinstance(layers, nn.Module) else None
        return read_method(place, layers, strict) or peft.read_peft(place, strict, base)
    return diffusion.read_diffusion(place / diffusion.WEIGHTS, strict)


@contextmanager
def offering_lenience(strict: bool) -> Iterator[None]:
    """Where a caller may say strict=False, and it would help, a note on the error says so."""
    try:
        yield
    except StrictError as error:
        if strict:
            error.add_note("strict=False skips it")
        raise


def read_for(
    model: nn.Module, folder: str | Path, strict: bool = True, part: str | None = None
) -> Saved:
    """`read_adapter`, its sites named as the model's layers. `part` says which part of a pipeline
    ("unet", "text_encoder", ...) to take from a file that holds several; else the one that fits.

    Raises TargetError naming what the model lacks and the nearest there is, PlanError for another
    size, InputError where `part` is missing or not in the file.
    """
    with offering_lenience(strict):
        saved = read_adapter(folder, strict, model)
    layers = layers_of(model) if isinstance(saved, Unplaced) else {}
    return place_on(saved, layers, part)
