"""The keys of PEFT's adapter_model.safetensors, sorted by what they stand for.

Below `base_model.model.PATH`: lora_A.weight (r, in, ...) and lora_B.weight (out, r, ...), for
embeddings lora_embedding_A (r, rows) and lora_embedding_B (width, r), DoRA's lora_magnitude_vector,
trainable_tokens_delta (tokens, width), biases, modules saved whole, and weights of the base.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from finespun.errors import FileError
from finespun.files.lora import Pair

T = TypeVar("T")
PREFIX = "base_model.model."
# modules that PEFT saves on its own account when they were resized or adapted
EMBEDDINGS = (
    "embed_tokens",
    "lm_head",
    "word_embeddings",
    "wte",
    "shared",
    "embed_in",
    "embed_out",
)
_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<end>\.weight)?")
_LENGTHS = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(\.weight)?")
_TOKENS = re.compile(r"(?P<path>.+?)(\.token_adapter)?\.trainable_tokens_delta")
_BASE = re.compile(r"(?P<path>.+)\.base_layer\.(?P<leaf>weight|bias)")
_REFUSED = {".lora_A.bias": "a bias on lora_A", ".lora_B.bias": "a bias on lora_B"}


@dataclass
class Parts:
    """What lies in the file, by path: pairs, rows of tables, biases, whole modules (module -> name
    -> tensor), and parameters of the base that the file repeats, by their names in the model."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)


def sort(tensors: Mapping[str, Tensor], saved: Sequence[str], bias: bool, dora: bool) -> Parts:
    """Sort a file's tensors. `saved` are the config's modules_to_save, `bias` says whether it
    trains biases, `dora` whether it has magnitudes. Raises FileError naming a key that is missing
    or not read."""
    parts, lengths = Parts(), dict[str, Tensor]()
    for key, tensor in tensors.items():
        for end, what in _REFUSED.items():
            if key.endswith(end):
                raise FileError(f"{key!r} is {what} (lora_bias), which is not read")
        if not key.startswith(PREFIX):
            raise FileError(f"{key!r} does not begin with {PREFIX!r}")
        name = key.removeprefix(PREFIX)
        if found := _LENGTHS.fullmatch(name):
            lengths[found["path"]] = tensor.float().flatten()
        elif not any(take(parts, key, name, tensor) for take in (_take_pair, _take_other)):
            _take_whole(parts, key, name, tensor, saved, bias)
    _check(parts, lengths, dora)
    return parts


def _take_pair(parts: Parts, key: str, name: str, tensor: Tensor) -> bool:
    found = _LORA.fullmatch(name)
    if found is None or bool(found["embedding"]) == bool(found["end"]):
        return False
    kind = "embedding" if found["embedding"] else "linear" if tensor.dim() == 2 else "conv"
    if not 2 <= tensor.dim() <= 5 or (kind == "embedding" and tensor.dim() != 2):
        raise FileError(f"{key!r} is {tuple(tensor.shape)}, no factor of a LoRA")
    if found["side"] == "B" and tensor.numel() != tensor.shape[0] * tensor.shape[1]:
        raise FileError(f"{key!r} is {tuple(tensor.shape)}; a convolution's lora_B is 1 wide")
    pair = parts.pairs.setdefault(found["path"], Pair(kind))
    if pair.kind != kind:
        raise FileError(f"{key!r} is a {kind}'s, its other factor a {pair.kind}'s")
    setattr(pair, found["side"], tensor.float().flatten(1))
    return True


def _take_other(parts: Parts, key: str, name: str, tensor: Tensor) -> bool:
    if found := _TOKENS.fullmatch(name):
        if tensor.dim() != 2:
            raise FileError(f"{key!r} is {tuple(tensor.shape)}, not (tokens, width)")
        parts.tokens[found["path"]] = tensor.float()
    elif found := _BASE.fullmatch(name):
        if found["leaf"] == "weight":
            parts.base[f"{found['path']}.weight"] = tensor
        else:
            parts.biases[found["path"]] = tensor
    else:
        return False
    return True


def _take_whole(
    parts: Parts, key: str, name: str, tensor: Tensor, saved: Sequence[str], bias: bool
) -> None:
    """A module of the adapter's own, or a bias."""
    path, _, leaf = name.rpartition(".")
    if bias and leaf == "bias" and path.endswith((".original_module", ".modules_to_save")):
        return  # bias="all" writes a saved module's bias three times
    module = saved_module(name, saved)
    if module is not None:
        parts.whole.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor
    elif bias and leaf == "bias" and path:
        parts.biases[path] = tensor
    else:
        raise FileError(f"{key!r} is neither lora_A nor lora_B, nor under modules_to_save")


def saved_module(name: str, saved: Sequence[str]) -> str | None:
    """The module that a key belongs to: PEFT takes every one whose path ends like a name listed,
    and tables of its own accord."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if any((PREFIX + path).endswith(one) for one in saved):
            return path
    return name.removesuffix(".weight") if is_table(name) else None


def is_table(name: str) -> bool:
    """Whether a tensor's name is that of a model's input or output table."""
    return f".{name}".endswith(tuple(f".{table}.weight" for table in EMBEDDINGS))


def repeated(name: str) -> str | None:
    """The number of the base that a key repeats, by its name in the model: PEFT saves the weight
    and bias of an adapted table along, unless save_embedding_layers=False."""
    found = _BASE.fullmatch(name)
    return None if found is None else f"{found['path']}.{found['leaf']}"


def in_order(held: Mapping[str, T]) -> dict[str, T]:
    """By name, the parameters in names by their size: layer 2 before layer 10."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(p) if p.isdecimal() else -1, p) for p in name.split(".")]

    return {name: held[name] for name in sorted(held, key=key)}


def _check(parts: Parts, lengths: Mapping[str, Tensor], dora: bool) -> None:
    for path, pair in parts.pairs.items():
        for side in "AB":
            if getattr(pair, side) is None:
                raise FileError(f"'{PREFIX}{path}.{_name(pair.kind, side)}' is missing")
        pair.m = lengths.get(path)
        if dora and pair.m is None:
            raise FileError(f"'{PREFIX}{path}.lora_magnitude_vector' is missing")
    for path in lengths:
        if path not in parts.pairs or not dora:
            where = "beside no lora_A" if dora else "there although use_dora is false"
            raise FileError(f"'{PREFIX}{path}.lora_magnitude_vector' is {where}")
    parts.pairs = in_order(parts.pairs)
    parts.biases = {p: t.float() for p, t in in_order(parts.biases).items()}
    if not parts.pairs and not parts.tokens:
        raise FileError("there is no lora_A and lora_B")


def _name(kind: str, side: str) -> str:
    return f"lora_embedding_{side}" if kind == "embedding" else f"lora_{side}.weight"


def keys_of(path: str, kind: str) -> tuple[str, str]:
    """The keys of a layer's two factors."""
    return f"{PREFIX}{path}.{_name(kind, 'A')}", f"{PREFIX}{path}.{_name(kind, 'B')}"
