"""Reading and writing safetensors and JSON that may be damaged or hostile: all is checked first."""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from finespun.errors import FileError, InputError, nearest
from finespun.storage.memory_limit import memory

HEADER_LIMIT = 32 << 20
JSON_LIMIT = 64 << 20
DEPTH_LIMIT = 64
KEY_LIMIT = 1024
LINE = 100
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
}


class TensorFile(NamedTuple):
    """What one safetensors file holds; `sha256` is that of all its bytes."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def read_tensors(path: Path, finite: bool = True) -> TensorFile:
    """Every tensor of a safetensors file, on the CPU and in memory of its own.

    Raises FileError, naming file and key, for a truncated file, a header that is too long, twice
    the same key, offsets that overlap or lie outside, an unknown dtype, and, if `finite`, for NaN
    or infinite values.
    """
    with _opened(path) as (file, size):
        metadata = _check_header(path, file, size)
        file.seek(0)
        try:
            data = file.read()
            tensors = safetensors.torch.load(data)
        except (SafetensorError, ValueError, RuntimeError, MemoryError) as error:
            raise FileError(f"{path}: {error or 'not enough memory for it'}") from error
    if finite:
        for key, tensor in tensors.items():
            check_finite(tensor, f"{path}: {key!r}")
    return TensorFile(tensors, metadata, hashlib.sha256(data).hexdigest())


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise FileError if a floating-point tensor holds NaN or infinity."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    bad = values.numel() - int(torch.isfinite(values).sum())
    if bad:
        raise FileError(f"{where} holds {bad} of {values.numel()} values that are NaN or infinite")


def check_dense(tensor: Tensor, key: str) -> None:
    """Raise InputError for a tensor that has no plain data of its own to write."""
    if hasattr(tensor, "full_tensor"):
        raise InputError(f"{key!r} is one shard of a tensor; gather it with full_tensor() first")
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise InputError(
            f"{key!r} is a {kind} tensor on {tensor.device}, which has no plain data to write; "
            "make it dense on the CPU first"
        )


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file and return its sha256; shared and strided tensors are copied.

    Raises InputError for tensors without data or in a layout that cannot be written.
    """
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        check_dense(tensor, key)
        plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
        storage = plain.untyped_storage()
        alone = storage.nbytes() == plain.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        ready[key] = plain if alone else plain.clone()
    path.touch()
    mode = path.stat().st_mode  # what the system gives new files; safetensors gives less
    try:
        safetensors.torch.save_file(ready, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(mode)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileError for anything else: broken text, twice the same
    key, NaN, nesting beyond 64 levels, or more than 64 MiB."""
    return parse_json(read_bytes(path), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """`read_json` for bytes; `where` begins every error message."""
    try:
        found = json.loads(
            data.decode(),
            object_pairs_hook=lambda pairs: _without_twins(pairs, where),
            parse_constant=lambda name: _refuse(f"{where}: {name} is no JSON number"),
            parse_float=lambda text: _number(text, where),
        )
    except RecursionError as error:
        raise FileError(f"{where}: nested more than {DEPTH_LIMIT} levels deep") from error
    except ValueError as error:
        raise FileError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise FileError(f"{where}: expected an object, found a {type(found).__name__}")
    check_depth(found, where)
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON a person can read: one line for what fits in a line, keys in the order given. Raises
    ValueError for NaN, TypeError for values that JSON lacks."""
    path.write_text(_lay_out(content, "") + "\n", encoding="utf-8")


def _lay_out(value: Any, indent: str) -> str:
    short = json.dumps(value, allow_nan=False)
    nested = isinstance(value, list | dict) and value
    if not nested or len(short) <= LINE or _flat_list(value):
        return short
    inner = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(str(k))}: {_lay_out(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(inner + p for p in parts) + f"\n{indent}}}"
    parts = [_lay_out(v, inner) for v in value]
    return "[\n" + ",\n".join(inner + p for p in parts) + f"\n{indent}]"


def _flat_list(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(v, list | dict) for v in value)


def read_bytes(path: Path, most: int = JSON_LIMIT) -> bytes:
    """The bytes of a regular file of at most `most` bytes. A link may lead to a file below its own
    folder, or to the blobs of a hub cache; every other one is refused. Raises FileError."""
    with _opened(path) as (file, size):
        if size > most:
            raise FileError(f"{path} has {size:,} bytes; at most {most:,} are read")
        return file.read(most)


def read_text(path: Path) -> str:
    """A text file of at most 64 MiB that lies in its folder itself: no link. Raises FileError."""
    if path.is_symlink():
        raise FileError(f"{path} is a link, and what it leads to is not shown")
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is no text: {error}") from error


def read_given(path: Path, most: int = JSON_LIMIT) -> bytes:
    """The bytes of a file that the user named: a regular file, reached through links too, of at
    most `most` bytes. Raises OSError where it cannot be opened, FileError for anything else."""
    check_given(path, most)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FileError(f"{path} has more than {most:,} bytes")
    return data


def check_given(path: Path, most: int) -> None:
    """Raise FileError for what is there and is no regular file (a pipe would be waited for), or
    has more than `most` bytes; OSError where there is nothing."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{path} is not a regular file")
    if found.st_size > most:
        raise FileError(f"{path} has {found.st_size:,} bytes; at most {most:,} are read")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, open, and its size; no more than the machine's memory holds."""
    try:
        folder, real = path.parent.resolve(), path.resolve()
        snapshots = [p for p in folder.parents if p.name == "snapshots"]  # of the Hub's cache
        caches = [folder.parent, *snapshots[:1]]
        allowed = folder, *(place.parent / "blobs" for place in caches)
        if not any(real.is_relative_to(place) for place in allowed):
            raise FileError(f"{path} is a link that leads out of its folder, to {real}: refused")
        found = real.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FileError(f"{path} is not a regular file")
        if found.st_size > memory():
            raise FileError(
                f"{path} has {found.st_size:,} bytes, more than this machine's memory of "
                f"{memory():,}"
            )
        with real.open("rb") as file:
            yield file, found.st_size
    except FileNotFoundError as error:
        there = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        raise FileError(f"{path} does not exist; {nearest(path.name, there)}") from error
    except (OSError, RuntimeError) as error:  # links that lead in a circle are either of them
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FileError(f"{path} cannot be read: {reason}") from error


def _check_header(path: Path, file: BinaryIO, size: int) -> dict[str, str]:
    """The metadata, once every entry is found valid and the sizes add up to that of the file."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise FileError(f"{path} is truncated or no safetensors file ({size:,} bytes)")
    if length > HEADER_LIMIT:
        raise FileError(f"{path}: a header of {length:,} bytes; at most {HEADER_LIMIT:,} are read")
    header = parse_json(file.read(length), f"{path} (header)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: the header's __metadata__ must map names to text")
    spans = sorted(_check_entry(path, key, entry) for key, entry in header.items())
    end, before = 0, "the header"
    for start, stop, key in spans:
        if start != end:
            what = "overlaps" if start < end else "leaves a gap after"
            raise FileError(f"{path}: the data of {key!r} {what} that of {before!r}")
        end, before = stop, key
    if end != size - 8 - length:
        raise FileError(
            f"{path} is truncated or has extra bytes: the header promises {end:,} bytes of data, "
            f"{size - 8 - length:,} are there"
        )
    return metadata


def _check_entry(path: Path, key: str, entry: Any) -> tuple[int, int, str]:
    where = f"{path}: {key[:80]!r}"
    if not 0 < len(key) <= KEY_LIMIT or not key.isprintable():
        raise FileError(f"{where} is no proper name for a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{where} must have exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in ITEM_BYTES:
        raise FileError(
            f"{where} has dtype {entry['dtype']!r}; {nearest(str(entry['dtype']), ITEM_BYTES)}"
        )
    numbers = (entry["shape"], entry["data_offsets"])
    if not all(isinstance(n, list) and all(type(i) is int and i >= 0 for i in n) for n in numbers):
        raise FileError(f"{where}: shape and data_offsets must be lists of whole numbers")
    if len(numbers[0]) > DEPTH_LIMIT or len(numbers[1]) != 2:
        raise FileError(f"{where}: a shape of {len(numbers[0])} sizes, {len(numbers[1])} offsets")
    size = math.prod(numbers[0]) * ITEM_BYTES[entry["dtype"]]
    start, stop = numbers[1]
    if stop - start != size:
        raise FileError(
            f"{where}: shape {tuple(numbers[0])} of {entry['dtype']} needs {size:,} bytes, the "
            f"offsets give {stop - start:,}"
        )
    return start, stop, key


def _without_twins(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twin = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise FileError(f"{where}: the key {twin[:80]!r} stands there twice")
    return found


def check_depth(content: Any, where: str) -> None:
    """Raise FileError for JSON values nested more than 64 levels deep."""
    level = [content]
    for _ in range(DEPTH_LIMIT):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise FileError(f"{where}: nested more than {DEPTH_LIMIT} levels deep")


def _number(text: str, where: str) -> float:
    if not math.isfinite(number := float(text)):
        raise FileError(f"{where}: {text[:80]} is larger than any number there is")
    return number


def _refuse(message: str) -> None:
    raise FileError(message)
