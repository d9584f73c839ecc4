"""The weights of a base model that lies in files, read one layer at a time: no model is built."""

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finespun.adapters.deltas import Deltas
from finespun.adapters.state import AdapterState
from finespun.contract import SiteShape, Structure
from finespun.errors import FileError, InputError, nearest
from finespun.files.diffusion.names import Layer
from finespun.files.peft.keys import is_table
from finespun.storage.safe_io import read_json

# transformers' families whose Conv1D layers store (in, out)
TRANSPOSED = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))


class StoredWeights:
    """The weights in a transformers folder, read one tensor at a time; all else stays on the disk.

    Raises FileError where the folder has no safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if not path.is_file():
                raise FileError(f"{path} is not a regular file")
            with _reading(path), safe_open(path, "pt") as file:
                self.files.update(dict.fromkeys(file.keys(), path))
        if not self.files:
            raise FileError(f"{self.folder} holds no weights in .safetensors files")
        config = self.folder / "config.json"
        kind = read_json(config).get("model_type") if config.is_file() else None
        self.transposed = isinstance(kind, str) and kind in TRANSPOSED

    def read(self, shape: SiteShape, leaf: str = "weight") -> Tensor:
        """W0 of a site, (out, in), or its bias (out,), in the precision of the file.

        The site's name may carry prefixes that the file lacks, or the other way round. Raises
        FileError where no tensor of that name and shape is there.
        """
        key = self._key(f"{shape.name}.{leaf}")
        with _reading(self.files[key]), safe_open(self.files[key], "pt") as file:
            value: Tensor = file.get_tensor(key)
        if leaf == "bias":
            return value
        wanted = shape.out_features, shape.in_features
        turned = tuple(value.shape) == wanted[::-1]
        if turned and (self.transposed or shape.kind == "embedding"):
            value = value.mT
        if value.shape[:1] != wanted[:1] or value.numel() != wanted[0] * wanted[1]:
            raise FileError(
                f"{self.folder}: {key!r} is {tuple(value.shape)}, the adapter has it as {wanted}"
            )
        return value.reshape(wanted)

    def layers(self) -> dict[str, Layer]:
        """Every weight of two dimensions or more as a layer, by the name of its module."""
        found = {}
        for key, path in self.files.items():
            name, _, leaf = key.rpartition(".")
            with safe_open(path, "pt") as file:
                size = tuple(file.get_slice(key).get_shape())
            if leaf == "weight" and len(size) > 1:
                kind = "linear" if len(size) == 2 else "conv"
                shape = SiteShape(name, size[0], math.prod(size[1:]), kind)
                found[name] = Layer(shape, size[1:] if kind == "conv" else ())
        return found

    def sites(
        self, names: Iterable[str], structure: Structure, tables: Collection[str] = ()
    ) -> "dict[str, StoredSite]":
        """The layers of these names, by the shapes of their weights; `tables` are embeddings among
        them. Raises FileError."""
        found = {}
        for name in names:
            key = self._key(f"{name}.weight")
            with _reading(self.files[key]), safe_open(self.files[key], "pt") as file:
                size = tuple(file.get_slice(key).get_shape())
            if len(size) < 2:
                raise FileError(f"{self.folder}: {key!r} is {size}, no layer's weight")
            kind = "linear" if len(size) == 2 else "conv"
            if name in tables:
                kind = "embedding"
            if kind == "embedding" or (kind == "linear" and self.transposed and not is_table(key)):
                size = size[::-1]
            found[name] = StoredSite(SiteShape(name, size[0], math.prod(size[1:]), kind), self)
        return found

    def has(self, shape: SiteShape, leaf: str) -> bool:
        """Whether the folder has this tensor."""
        return self._find(f"{shape.name}.{leaf}") is not None

    def _key(self, name: str) -> str:
        found = self._find(name)
        if found is None:
            raise FileError(f"{self.folder} has no tensor {name!r}; {nearest(name, self.files)}")
        return found

    def _find(self, name: str) -> str | None:
        parts = name.split(".")
        for begin in range(len(parts) - 1):
            shorter = ".".join(parts[begin:])
            if shorter in self.files:
                return shorter
        longer = [key for key in self.files if key.endswith("." + name)]
        if not longer and name.endswith("lm_head.weight"):  # tied to the only table
            longer = [key for key in self.files if is_table(key)]
        return longer[0] if len(longer) == 1 else None


@dataclass(frozen=True)
class StoredSite:
    """A site of an adapter in files: its shape, and its weight where the base is at hand."""

    shape: SiteShape
    base: StoredWeights | None = None
    coupling: None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def weight(self) -> Tensor:
        """W0 (out, in). Raises InputError where no base was named, FileError where it does not
        have this weight."""
        return self._base().read(self.shape).to(self.dtype)

    def bias(self) -> Tensor | None:
        """b0 (out,), or None where the layer has none."""
        base = self._base()
        return base.read(self.shape, "bias") if base.has(self.shape, "bias") else None

    def _base(self) -> StoredWeights:
        if self.base is None:
            raise InputError(
                f"the update of {self.shape.name!r} depends on the base weight: name the folder "
                "of the base model (model=..., on the command line --model)"
            )
        if ":" in self.shape.name:
            raise InputError(
                f"{self.shape.name!r} is a slice of a weight, not distinguished by files alone; "
                "load the adapter on its model and export it from there"
            )
        return self.base


def deltas_of(state: AdapterState, base: StoredWeights | None = None) -> Deltas:
    """The deltas of an adapter one by one, over the weights of a folder where they are needed."""
    return Deltas(state, lambda shape: StoredSite(shape, base))


def source_name(folder: Path) -> tuple[str, str | None]:
    """Base model's name and task that a PEFT config in the folder gives, else ("", None)."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return "", None
    told = read_json(path)
    return str(told.get("base_model_name_or_path") or ""), told.get("task_type")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in what safetensors says of it."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
