"""What lies where new work would be written: older work is kept unless the user says otherwise."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from finespun.errors import FileError, InputError
from finespun.files.diffusion.read import WEIGHTS
from finespun.files.native import CONFIG, TENSORS
from finespun.files.peft.read import CONFIG as PEFT_CONFIG
from finespun.files.peft.read import TENSORS as PEFT_TENSORS
from finespun.storage.atomic import check_own_folder, check_writable, settled
from finespun.storage.safe_io import read_bytes, read_json

INDEX = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
HEAD = "classifier.safetensors"
RECIPE_KEYS = (rb"^model:", rb"^(data|structure|targets):")
LORA_WORDS = ("lora", "hada_", "lokr_")


def _holds_keys(place: Path, name: str, *keys: str) -> bool:
    """Whether the file there is a JSON object with these keys; what cannot be read is none."""
    try:
        return (place / name).is_file() and read_json(place / name).keys() >= set(keys)
    except FileError:
        return False


def _is_recipe(path: Path) -> bool:
    try:
        text = read_bytes(path) if path.is_file() else b""
    except FileError:
        return False
    return all(re.search(key, text, re.MULTILINE) for key in RECIPE_KEYS)


def _is_lora(path: Path) -> bool:
    """Whether a safetensors file has tensors whose names are those of a LoRA, LoHa or LoKr."""
    try:
        with safe_open(path, "pt") as file:
            return any(word in key for key in file.keys() for word in LORA_WORDS)  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


class Work(NamedTuple):
    """A kind of folder: its name, words for it, files that only such a folder has, others that a
    new one takes the place of, and how one that may be replaced is known."""

    kind: str
    words: str
    files: tuple[str, ...]
    more: tuple[str, ...]
    known: Callable[[Path], bool]

    def lies_in(self, place: Path) -> bool:
        """Whether a folder is, or might be, of this kind."""
        return any(_present(place, self.files)) or self.known(place)


WORKS = (
    Work(
        "run",
        "a run",
        ("recipe.yaml", "metrics.json"),
        ("metrics.jsonl", "checkpoints"),
        lambda p: _is_recipe(p / "recipe.yaml"),
    ),
    Work(
        "native",
        "an adapter",
        (CONFIG, TENSORS),
        (),
        lambda p: _holds_keys(p, CONFIG, "format", "structure", "plan"),
    ),
    Work(
        "peft",
        "an adapter in PEFT's format",
        (PEFT_CONFIG, PEFT_TENSORS),
        (),
        lambda p: _holds_keys(p, PEFT_CONFIG, "peft_type"),
    ),
    Work(
        "diffusers",
        "an adapter in diffusers' format",
        (WEIGHTS,),
        (),
        lambda p: _is_lora(p / WEIGHTS),
    ),
    Work("pipeline", "a pipeline of diffusers", ("model_index.json",), (), lambda p: False),
    Work(
        "model",
        "a model",
        ("model.safetensors", INDEX, SHARDS),
        ("config.json", HEAD),
        lambda p: _holds_keys(p, "config.json", "model_type"),
    ),
)
FOLDER_FORMATS = {"run": ("run", "native")}  # a run's folder is an adapter's too
ONE_FILE = ("diffusers", "kohya")


def refuse_to_lose(out: str | Path, kind: str, overwrite: bool = False) -> None:
    """Raise InputError where writing work of this kind ("run", "native", "peft", "diffusers",
    "kohya", "model") to `out` would take the place of older work, FileError where nothing can be
    written.

    `overwrite` allows it for work of the same kind that is known as such by its content. Work of
    another kind would stay beside the new, and the two be taken for one: that is refused always,
    as is a file of the same name that is something else.
    """
    place = settled(out)
    if place.is_file():
        found = _file_in_the_way(out, place, kind)
    else:
        found = _folder_in_the_way(out, place, kind)
    if found and not overwrite:
        raise InputError(
            f"{str(out)!r} {found}: --overwrite (overwrite=True) replaces it, another name keeps "
            "both"
        )
    if kind != "kohya":
        check_own_folder(place)
    check_writable(place)


def _file_in_the_way(out: str | Path, place: Path, kind: str) -> str:
    if kind not in ONE_FILE or place.suffix != ".safetensors":
        raise FileError(f"{str(out)!r} is a file; name a folder")
    if not _is_lora(place):
        raise InputError(f"{str(out)!r} is a file without a LoRA, which stays: name another file")
    return "exists"


def _folder_in_the_way(out: str | Path, place: Path, kind: str) -> str:
    """What would be replaced there, in words; nothing where the folder is free."""
    own, found = FOLDER_FORMATS.get(kind, (kind,)), ""
    for work in WORKS:
        if work.kind not in own:
            if work.lies_in(place):
                raise InputError(
                    f"{str(out)!r} holds {work.words}, which stays as it is: name another folder"
                )
        elif there := _present(place, (*work.files, *work.more)):
            if not work.known(place):
                raise InputError(
                    f"{str(out)!r} holds {there[0]} but is not known as {work.words}, so it stays "
                    "as it is: name another folder"
                )
            found = found or f"holds {work.words}"
    return found


def _present(place: Path, patterns: tuple[str, ...]) -> list[str]:
    return [path.name for pattern in patterns for path in place.glob(pattern)]
