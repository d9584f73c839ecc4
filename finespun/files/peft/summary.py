"""What a folder of PEFT's holds, described without its model, whatever its method."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finespun.files.lora import PASSED
from finespun.files.peft.keys import PREFIX, in_order, repeated, saved_module
from finespun.files.peft.methods import OFF, SHARED, split
from finespun.files.peft.read import CONFIG, TENSORS
from finespun.files.peft.table import METHODS
from finespun.storage.atomic import settled
from finespun.storage.blame import blame
from finespun.storage.safe_io import read_json, read_tensors


@dataclass(frozen=True)
class FileSummary:
    """The method and the structure that reads it (None: not read), PEFT's options that say
    something, tensors by layer (none of the base's own), those that all layers share, modules saved
    whole by their sizes, the base's name, and the size and digest of the file of tensors."""

    method: str
    kind: str | None
    options: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor]
    modules: Mapping[str, int]
    base: str
    bytes: int
    sha256: str

    @property
    def numbers(self) -> int:
        """Parameters of the updates, frozen ones and indices in the file included."""
        every = [*self.shared.values(), *(t for own in self.layers.values() for t in own.values())]
        return sum(t.numel() for t in every)


def summarise(folder: str | Path) -> FileSummary | None:
    """What lies in a folder of a method that needs its model to be read, or is not read at all;
    None for any other folder. Raises FileError for a file that is damaged."""
    place = settled(folder)
    config = read_json(place / CONFIG) if (place / CONFIG).is_file() else {}
    method = config.get("peft_type", "LORA")
    if method in ("LORA", "TRAINABLE_TOKENS"):
        return None
    held = read_tensors(place / TENSORS)
    layers: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    modules: dict[str, int] = {}
    with blame(place):
        saved = [str(name) for name in config.get("modules_to_save") or []]
        for key, tensor in in_order(held.tensors).items():
            name = key.removeprefix(PREFIX)
            path, own = split(name)
            if (module := saved_module(name, saved)) is not None:
                modules[module] = modules.get(module, 0) + tensor.numel()
            elif name == key or not path:
                shared[key.removeprefix(SHARED)] = tensor
            elif repeated(name) is None:
                layers.setdefault(path, {})[own] = tensor
    known = METHODS.get(method) if isinstance(method, str) else None
    passed = (PASSED | {"peft_type", "modules_to_save"}) - {"target_modules"}
    return FileSummary(
        str(method)[:60],
        known.kind if known is not None else None,
        {k: v for k, v in config.items() if v not in OFF and k not in passed},
        layers,
        shared,
        modules,
        str(config.get("base_model_name_or_path") or ""),
        (place / TENSORS).stat().st_size,
        held.sha256,
    )
