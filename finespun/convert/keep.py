"""What lies where a conversion would write: older work is kept unless the user says otherwise."""

from pathlib import Path

from finespun.convert.stored import INDEX
from finespun.errors import FileError, InputError
from finespun.files import check_writable, settled
from finespun.files.card import CARD
from finespun.files.diffusion import WEIGHTS
from finespun.files.native import CONFIG, TENSORS
from finespun.files.peft import CONFIG as PEFT_CONFIG
from finespun.files.peft import TENSORS as PEFT_TENSORS

# What makes a folder what it is: kind, words for it, files that only such a folder has.
WORKS = (
    ("run", "a run", ("recipe.yaml", "metrics.json")),
    ("native", "an adapter", (CONFIG, TENSORS)),
    ("peft", "an adapter in PEFT's format", (PEFT_CONFIG, PEFT_TENSORS)),
    ("diffusers", "an adapter in diffusers' format", (WEIGHTS,)),
    ("model", "a model", ("config.json", "model.safetensors", INDEX, "model_index.json")),
)
CARDED, ONE_FILE = ("native", "peft"), ("diffusers", "kohya")


def refuse_to_lose(out: str | Path, kind: str, overwrite: bool = False) -> None:
    """Raise InputError where writing work of this kind ("native", "peft", "diffusers", "kohya",
    "model") to `out` would take the place of older work, FileError where nothing can be written.

    `overwrite` allows it for work of the same kind. Work of another kind would stay beside the
    new, and the two be taken for one: that is refused always.
    """
    place = settled(out)
    for other, words, files in WORKS:
        if other == kind or not any((place / name).exists() for name in files):
            continue
        raise InputError(f"{str(out)!r} holds {words}, which stays as it is: name another folder")
    found = _in_the_way(place, kind)
    if place.is_file() and not found:
        raise FileError(f"{str(out)!r} is a file; name a folder")
    if found and not overwrite:
        raise InputError(
            f"{str(out)!r} {found}: --overwrite (overwrite=True) replaces it, another name keeps "
            "both"
        )
    check_writable(place)


def _in_the_way(place: Path, kind: str) -> str:
    """What would be replaced there, in words; nothing where the place is free."""
    if place.is_file():
        return "exists" if kind in ONE_FILE and place.suffix == ".safetensors" else ""
    for own, words, files in WORKS:
        if own == kind and any((place / name).exists() for name in files):
            return f"holds {words}"
    return f"holds a {CARD}" if kind in CARDED and (place / CARD).exists() else ""
