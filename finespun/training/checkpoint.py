"""Training checkpoints: a nested state as one safetensors file and one JSON file, nothing pickled.

`FOLDER/step-000000120/` holds `state.safetensors` and `state.json`. A checkpoint appears by one
rename, so that a killed run leaves the one before or this one, whole.
"""

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finespun.errors import FileError, InputError, an
from finespun.storage.atomic import located, put_aside, remove_folder, settled, whole_folder
from finespun.storage.safe_io import (
    check_dense,
    check_depth,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

FORMAT = 1
TENSORS, TREE = "state.safetensors", "state.json"
Array = np.ndarray[Any, Any] | np.generic
_KINDS = "biufc"
_STEP = re.compile(r"step-(\d{9,})")
_PLAIN = (bool, int, str, type(None))
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_STORED = frozenset((*_FLOATS, *_WHOLE))


def save_checkpoint(folder: str | Path, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `state` as the checkpoint of step state["step"], then delete all but the last `keep`.

    `state` may nest dicts (keys of any plain kind), lists, tuples, numbers, text, None, tensors of
    every dense dtype and numpy arrays: an adapter's tensors, `optimizer.state_dict()`,
    `scheduler.state_dict()`, `random_state()`, the place in the data, metrics so far. Returns the
    checkpoint's folder. Raises InputError naming what cannot be written without pickling, FileError
    where the disk refuses; the checkpoints before stay then.
    """
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise InputError(f'state["step"] must be a whole number, 0 or more, got {step!r}')
    if keep < 1:
        raise InputError(f"keep={keep} would delete the checkpoint just written; try 2")
    tensors: dict[str, Tensor] = {}
    try:
        tree = _encode(dict(state), "state", tensors)
        check_depth(tree, "state")
    except (RecursionError, FileError) as error:
        raise InputError(f"the state is nested too deeply to be written: {error}") from error
    place = located(folder) / f"step-{step:09d}"
    with whole_folder(place, sum(t.nbytes for t in tensors.values()) + (1 << 16)) as work:
        digest = write_tensors(work / TENSORS, tensors)
        write_json(work / TREE, {"format": FORMAT, "sha256": digest, "state": tree})
    for old in checkpoints(folder)[:-keep]:
        if old != place and old.exists():
            remove_folder(old)
    return place


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    root = located(folder)
    if not root.is_dir():
        return []
    found = {p for p in root.iterdir() if p.is_dir()} | set(put_aside(root))
    named = [(int(m[1]), p) for p in found if (m := _STEP.fullmatch(p.name))]
    return [path for _, path in sorted(named)]


def load_checkpoint(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """The state of the last checkpoint in `folder`, or of the one at `step`; tensors on the CPU.

    Raises FileError where there is none, or where its files are damaged; it then names the one
    before.
    """
    found = {int(p.name.removeprefix("step-")): p for p in checkpoints(folder)}
    if not found:
        raise FileError(
            f"{folder} holds no checkpoint (a folder called step-000000000 or the like)"
        )
    at = max(found) if step is None else step
    if at not in found:
        raise FileError(f"{folder} has no checkpoint of step {at}; there are {sorted(found)}")
    try:
        return _read(settled(found[at]))
    except FileError as error:
        older = [s for s in found if s < at]
        hint = f"; the one before is step={max(older)}" if older else ""
        raise FileError(f"{error}{hint}") from error


def last_whole(folder: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The state of the newest checkpoint that is whole, and what is wrong with each newer one.

    Raises FileError where none is whole.
    """
    wrong: list[str] = []
    for place in reversed(checkpoints(folder)):
        try:
            return _read(settled(place)), wrong
        except FileError as error:
            wrong.append(str(error))
    raise FileError(f"{folder} holds no whole checkpoint: {'; '.join(wrong) or 'there is none'}")


def random_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators (every CUDA device included)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put all generators back to what `random_state` read; CUDA's where devices are as many."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _read(place: Path) -> dict[str, Any]:
    tree = read_json(place / TREE)
    if tree.get("format") != FORMAT:
        raise FileError(
            f"{place / TREE} has format {tree.get('format')!r}; this version reads {FORMAT}"
        )
    held = read_tensors(place / TENSORS, finite=False)
    if held.sha256 != tree.get("sha256"):
        raise FileError(f"{place / TENSORS} is not the file that {TREE} was written with")
    try:
        state = _decode(tree.get("state"), held.tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileError(f"{place / TREE} is damaged: {error!r}") from error
    if not isinstance(state, dict):
        raise FileError(f"{place / TREE} is damaged: it holds a {type(state).__name__}")
    return state


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value; its tensors go into `tensors`. Tags begin with "$"."""
    if isinstance(value, Tensor):
        return {"$tensor": _keep(value, path, tensors), **_cast(value)}
    if isinstance(value, np.ndarray | np.generic):
        return {"$array": _keep(_bytes(value, path), path, tensors), **_shape(value)}
    if type(value) in _PLAIN:
        return value
    if type(value) is float:
        return value if value - value == 0 else {"$float": repr(value)}
    if isinstance(value, Mapping):
        if all(type(k) is str for k in value) and not any(k.startswith("$") for k in value):
            return {k: _encode(v, f"{path}/{k}", tensors) for k, v in value.items()}
        pairs = [
            [_encode(k, f"{path}/key", tensors), _encode(v, f"{path}/{k}", tensors)]
            for k, v in value.items()
        ]
        return {"$dict": pairs}
    if isinstance(value, list | tuple):
        items = [_encode(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise InputError(
        f"{path} is {an(type(value).__name__)}, which a checkpoint cannot hold: only dicts, lists, "
        "numbers, text, tensors and arrays"
    )


def _keep(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    """Store a tensor under a readable key that is free, and return the key."""
    key = re.sub(r"[^ -~]", "_", path)[:200]
    if key in tensors:
        key = f"{key}#{len(tensors)}"
    check_dense(tensor, path)
    data = tensor.detach().cpu()
    tensors[key] = (
        data if data.dtype in _STORED else data.contiguous().reshape(-1).view(torch.uint8)
    )
    return key


def _cast(tensor: Tensor) -> dict[str, Any]:
    """What restores a dtype that is stored as bytes."""
    if tensor.dtype in _STORED:
        return {}
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _bytes(array: Array, path: str) -> Tensor:
    if array.dtype.kind not in _KINDS or not array.dtype.isnative:
        raise InputError(f"{path} is an array of {array.dtype}; only plain numbers can be written")
    return torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())


def _shape(array: Array) -> dict[str, Any]:
    scalar = isinstance(array, np.generic)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "scalar": scalar}


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next((k for k in value if k.startswith("$")), None)
    if tag is None:
        return {k: _decode(v, tensors) for k, v in value.items()}
    held = value[tag]
    if tag == "$tensor":
        tensor = tensors[held]
        if "dtype" not in value:
            return tensor
        dtype = getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value['dtype']!r} is no dtype")
        return tensor.view(dtype).reshape(value["shape"])
    if tag == "$array":
        kind = np.dtype(value["dtype"])
        if kind.kind not in _KINDS:
            raise ValueError(f"{value['dtype']!r} is no dtype of numbers")
        array = tensors[held].numpy().copy().view(kind).reshape(value["shape"])
        return array[()] if value["scalar"] else array
    if tag == "$float":
        return float(held)
    if tag == "$tuple":
        return tuple(_decode(v, tensors) for v in held)
    if tag == "$dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in held}
    raise ValueError(f"unknown tag {tag!r}")
