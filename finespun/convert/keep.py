"""What lies where a conversion would write: older work is kept unless the user says otherwise."""

from pathlib import Path

from finespun.convert.stored import INDEX
from finespun.errors import InputError
from finespun.files import settled
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
CARDED = ("native", "peft")


def refuse_to_lose(out: str | Path, kind: str, overwrite: bool = False) -> None:
    """Raise InputError where writing work of this kind ("native", "peft", "diffusers", "kohya",
    "model") to `out` would take the place of older work.

    `overwrite` allows it for work of the same kind. Work of another kind would stay beside the
    new, and the two be taken for one: that is refused always.
    """
    place = settled(out)
    ways = "--overwrite (overwrite=True) replaces it, another name keeps both"
    if place.is_file():
        if not overwrite:
            raise InputError(f"{str(out)!r} exists: {ways}")
        return
    for other, words, names in WORKS:
        if not any((place / name).exists() for name in names):
            continue
        if other != kind:
            raise InputError(f"{str(out)!r} holds {words}, which stays as it is: name another folder")
        if not overwrite:
            raise InputError(f"{str(out)!r} holds {words}: {ways}")
        return
    if kind in CARDED and not overwrite and (place / CARD).exists():
        raise InputError(f"{str(out)!r} holds a {CARD}: {ways}")
