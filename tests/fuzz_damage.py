"""Ways to damage the files of a folder, each drawn from a `random.Random`.

A way takes the folder, one of its files and the random numbers, and returns a short account of
what it did. Half of them know what safetensors and JSON look like, so that damage gets deep.
"""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

Way = Callable[[Path, random.Random], str]
TERA = 1 << 40
MOST = 1 << 24
CANARY = "executed"

# What stands in place of a JSON value: kinds, sizes and texts that no reader expects.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**31 - 1, 2**40, 2**62, 2**63, 10**30, 10**400,
    -(10**400), 0.0, -0.5, 0.5, 1e-300, 1e308, "", " ", "8", "nan", "inf", "1e400", "x" * 5000,
    "\x1b[2J\x00", "../../../etc/passwd", "/etc/passwd", "a/../b", "..", ".", "\\", "lora", "LORA",
    "float32", "O", "float4_e2m1fn_x2", "bits8", "(1000000000,)f4", "(a+)+$", "(((a*)*)*)*b", "(",
    "[", "*", ".*.*.*.*.*.*.*.*x", "(.*)*" * 6 + "x", [], {}, [[]], [{}], [None], {"": 0},
    [0] * 5000, [1, 2, 3], [10**400], {"a": {"b": {"c": []}}}, {"rank": 10**9},
    {"$tensor": "none"}, {"$dict": [[[], 1]]}, [[2**40, 2**40]],
    {"$array": "x", "dtype": "O", "shape": [2**62], "scalar": True},
)  # fmt: skip


class Canary:
    """Unpickled, it writes a file called `executed` into the folder that it was made for."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder / CANARY)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.place, "w")


# --- bytes ---------------------------------------------------------------------------------------
def cut(path: Path, draw: random.Random) -> str:
    data = path.read_bytes()
    length = draw.choice([0, 1, 7, 8, 9, draw.randrange(len(data) + 1), max(len(data) - 1, 0)])
    path.write_bytes(data[:length])
    return f"cut to {length} bytes"


def flip(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    for _ in range(min(draw.choice([1, 1, 2, 8, 64]), len(data))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)
    return "bytes changed"


def splice(path: Path, draw: random.Random) -> str:
    data = path.read_bytes()
    a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    middle = draw.choice([b"", data[a:b] * 2, bytes(b - a), draw.randbytes(draw.randrange(99))])
    path.write_bytes(data[:a] + middle + data[b:])
    return f"bytes {a} to {b} replaced by {len(middle)} others"


def grow(path: Path, draw: random.Random) -> str:
    size = draw.choice([path.stat().st_size + 1, path.stat().st_size * 2, 1 << 30, TERA])
    os.truncate(path, size)
    return f"{size:,} bytes long, the rest zeros"


def noise(path: Path, draw: random.Random) -> str:
    path.write_bytes(draw.randbytes(draw.choice([1, 8, 100, 5000])))
    return "random bytes"


def pickled(path: Path, draw: random.Random) -> str:
    """The file itself becomes a pickle, or one lies beside it under a name that others load."""
    names = (path.name, "adapter_model.bin", "adapter.pt", "state.pt", "pytorch_model.bin")
    place = path.with_name(draw.choice(names))
    if draw.random() < 0.5 and place != path:
        path.unlink(missing_ok=True)
    place.write_bytes(pickle.dumps(Canary(path.parent)))
    return f"a pickle as {place.name}"


# --- the file system -----------------------------------------------------------------------------
def replaced(path: Path, draw: random.Random) -> str:
    """Something that is no regular file, or a link that leads elsewhere."""
    path.unlink()
    what = draw.choice(["nothing", "a folder", "a pipe", "/dev/zero", "itself", "a file outside"])
    if what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "itself":
        path.symlink_to(path.name)
    elif what == "a file outside":
        outside = path.parent.with_name(f"{path.name}.outside")
        outside.write_text("{}")
        path.symlink_to(f"../{outside.name}")
    elif what == "/dev/zero":
        path.symlink_to(what)
    return f"{what} in its place"


def swapped(path: Path, draw: random.Random) -> str:
    other = draw.choice([p for p in sorted(path.parent.iterdir()) if plain(p)])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return f"swapped with {other.name}"


def plain(path: Path) -> bool:
    """Whether it is a small regular file: nothing is ever read or written through a link."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= MOST


# --- JSON ----------------------------------------------------------------------------------------
def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key or index) below a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            places(value[key], found)
    return found


def json_value(path: Path, draw: random.Random) -> str:
    content = json.loads(path.read_bytes())
    every = places(content, [])
    told = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        container, key = draw.choice(every)
        if key not in container and isinstance(container, dict):
            continue
        how = draw.choice(["odd", "odd", "odd", "gone", "extra", "renamed", "moved"])
        if how == "odd":
            container[key] = draw.choice(ODD)
        elif how == "moved":
            other, there = draw.choice(every)
            if isinstance(other, list) or there in other:
                container[key] = json.loads(json.dumps(other[there]))
        elif isinstance(container, list):
            container.insert(0, draw.choice(ODD))
        elif how == "gone":
            del container[key]
        else:
            value = container.pop(key) if how == "renamed" else draw.choice(ODD)
            container[draw.choice(["", "x", f"{key}s", "../x", "__class__", "(.+)+x"])] = value
        told.append(f"{how} at {str(key)[:40]!r}")
    path.write_text(json.dumps(content))
    return ", ".join(told) or "nothing"


def json_text(path: Path, draw: random.Random) -> str:
    text = path.read_text()
    what = draw.choice(
        ["twice", "deep", "NaN", "Infinity", "1e999", "9" * 5000, "0" * 99, "'", ","]
    )
    at = draw.choice([i for i, c in enumerate(text) if c in ",:{["]) + 1
    if what == "twice":
        new = text[:1] + draw.choice(['"format": 1, "format": 2,', '"r": 8, "r": 9,']) + text[1:]
    elif what == "deep":
        depth = draw.choice([65, 1000, 100_000])
        new = text[:at] + "[" * depth + "]" * depth + text[at:]
    else:
        new = text[:at] + what + text[at:]
    path.write_text(new)
    return f"{what[:10]} in its text"


# --- safetensors ---------------------------------------------------------------------------------
def header(path: Path, draw: random.Random) -> str:
    """One entry of the header lies; the data stay, or grow without being there."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    content, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in content if name != "__metadata__"]
    entry = content[draw.choice(names)]
    kind = draw.choice(["dtype", "shape", "immense", "offsets", "odd", "metadata", "length"])
    if kind == "dtype":
        entry["dtype"] = draw.choice(["F64", "I8", "F16", "BF16", "U8", "F4", "C64", "", 3])
    elif kind == "shape":
        entry["shape"] = draw.choice([[], [0], [-1, 4], [2**63], [1.5], entry["shape"][::-1]])
    elif kind == "immense":
        start = max(content[n]["data_offsets"][1] for n in names)
        content["zz.lora_A.weight"] = {
            "dtype": "U8", "shape": [TERA], "data_offsets": [start, start + TERA],
        }  # fmt: skip
    elif kind == "offsets":
        at = draw.randrange(2)
        entry["data_offsets"][at] += draw.choice([-4, 4, 2**62, -(2**62)])
    elif kind == "odd":
        entry[draw.choice(list(entry))] = draw.choice(ODD)
    elif kind == "metadata":
        content["__metadata__"] = draw.choice(ODD)
    text = json.dumps(content).encode()
    told = draw.choice([2**62, 2**63, len(text) + 1, 0, 200 << 20]) if kind == "length" else None
    path.write_bytes(struct.pack("<Q", len(text) if told is None else told) + text + rest)
    if kind == "immense" and draw.random() < 0.5:
        os.truncate(path, path.stat().st_size + TERA)
    return f"header: {kind}"


def tensor(path: Path, draw: random.Random) -> str:
    """One tensor is another; the file is well-formed."""
    held = load(path.read_bytes())
    key = draw.choice(sorted(held))
    value = held[key]
    kind = draw.choice(
        ["gone", "key", "turned", "NaN", "inf", "cast", "empty", "longer", "twin", "huge", "flat"]
    )
    if kind in ("gone", "key"):
        held.pop(key)
    if kind == "key":
        other = draw.choice(["x", "../x", key + "x", key.replace("A", "B"), "delta//A", key[:-1]])
        held[other] = value
    elif kind == "turned" and value.dim() == 2:
        held[key] = value.mT.contiguous()
    elif kind in ("NaN", "inf", "huge") and value.is_floating_point() and value.numel():
        held[key] = value.clone()
        held[key].view(-1)[draw.randrange(value.numel())] = float(kind.replace("huge", "3e38"))
    elif kind == "cast":
        dtypes = (torch.float64, torch.bfloat16, torch.int32, torch.uint8, torch.bool,
                  torch.complex64, torch.float8_e4m3fn)  # fmt: skip
        held[key] = value.to(draw.choice(dtypes))
    elif kind == "empty":
        held[key] = value.new_empty(draw.choice([(0,), (0, 24), (2, 0)]))
    elif kind == "longer":
        held[key] = torch.cat([value.reshape(1, -1)] * 2, 1).reshape(-1, *value.shape[1:])
    elif kind == "twin":
        held[key + ".copy"] = value.clone()
    elif kind == "flat":
        held[key] = value.reshape(-1).clone()
    path.write_bytes(save(held, {"format": "pt"}))
    return f"{key[:60]!r}: {kind}"


ANY = (cut, flip, splice, grow, noise, pickled, replaced, swapped)
JSON = (json_value, json_value, json_value, json_value, json_text)
TENSORS = (header, header, tensor, tensor, tensor)


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one of a folder's files in a way that suits it."""
    path = draw.choice([p for p in sorted(folder.iterdir()) if plain(p)] or [folder])
    if path == folder:
        return "nothing left to damage"
    own = {".json": JSON, ".safetensors": TENSORS}.get(path.suffix, ())
    way = draw.choice(own if own and draw.random() < 0.75 else ANY)
    try:
        return f"{path.name}: {way(path, draw)}"
    except (ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError):
        return f"{path.name}: too damaged already for {way.__name__}"
