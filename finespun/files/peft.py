"""Reading LoRA folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

Each site's scale is alpha / r, or alpha / √r with rsLoRA; rank_pattern and alpha_pattern give
single sites their own r and alpha, their keys being regular expressions for the end of a path. What
cannot be read is refused by name. Format: PEFT 0.21; the paths in the file decide where updates go.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finespun.errors import FileError, nearest
from finespun.files.atomic import located, settled
from finespun.files.fingerprint import Fingerprint
from finespun.files.lineage import Lineage
from finespun.files.native import Saved, blame
from finespun.files.safe import TensorFile, read_json, read_tensors
from finespun.hosts import Entry, FlatState
from finespun.structures import LoRA, Plan, SiteShape

CONFIG, TENSORS, SIDE = "adapter_config.json", "adapter_model.safetensors", "finespun.json"
PREFIX = "base_model.model."
STARTS = (True, False, "gaussian", "orthogonal", "eva")
USED = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "use_rslora",
        "init_lora_weights",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
    ]
)
# These change nothing once the paths of the tensors are known,
PASSED = frozenset(
    [
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "runtime_config",
        "layers_to_transform",
        "layers_pattern",
        "eva_config",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
    ]
)
# and these change the function in ways that are not read.
REFUSED = [
    "use_dora",
    "lora_bias",
    "use_qalora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
    "ensure_weight_tying",
]
_PAIR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
_OTHER = {
    ".lora_embedding_": "a LoRA on an embedding",
    ".lora_magnitude_vector": "DoRA's magnitudes",
    ".lora_B.bias": "a bias on lora_B",
}


def read_peft(folder: str | Path, strict: bool = True) -> Saved:
    """A PEFT LoRA folder as a flat entry with a `LoRA` structure, named after the folder.

    With `strict` off, unknown keys of the config become notes. Raises FileError naming what is
    damaged, missing or not read.
    """
    place = settled(folder)
    config = read_json(place / CONFIG)
    notes: list[str] = []
    with blame(place / CONFIG):
        _check_config(config, strict, notes)
        structure = LoRA(
            rank=config.get("r", 8),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0.0)),
            rslora=bool(config.get("use_rslora", False)),
        )
    if not (place / TENSORS).exists() and (place / "adapter_model.bin").exists():
        raise FileError(
            f"{place} holds adapter_model.bin, which is pickled and not opened; save it again from "
            "PEFT with save_pretrained(..., safe_serialization=True)"
        )
    held = read_tensors(place / TENSORS)
    with blame(place / TENSORS):
        pairs, whole = _sort(held.tensors, _names(config.get("modules_to_save") or []))
        sites, choices = _plan(pairs, config, notes)
    tensors = {f"delta/{p}/{side}": t for p, pair in pairs.items() for side, t in pair.items()}
    tensors |= {f"trained/{m}/{k}": t for m, state in whole.items() for k, t in state.items()}
    name, base, lineage = _beside(place, held, notes)
    entry = Entry(
        name=name or re.sub(r"[.:/]", "-", located(folder).name) or "default",
        structure=structure,
        plan=Plan(sites, choices),
        trained=tuple(whole),
        flat=FlatState.pack(tensors),
    )
    return Saved(entry, base, lineage, held.sha256, tuple(notes))


def _check_config(config: Mapping[str, Any], strict: bool, notes: list[str]) -> None:
    if config.get("peft_type") != "LORA":
        raise FileError(f"peft_type is {config.get('peft_type')!r}; only 'LORA' is read")
    refused = [k for k in REFUSED if config.get(k)]
    if config.get("bias", "none") != "none":
        refused.append("bias")
    if refused:
        raise FileError(
            "not read: " + ", ".join(f"{k}={str(config[k])[:60]}" for k in refused)
            + "; merge it in PEFT, or save it without"
        )  # fmt: skip
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise FileError(
            f"init_lora_weights={start!r} changes the base's own weights when PEFT loads it; save "
            "it from PEFT with path_initial_model_for_weight_conversion"
        )
    known = {*USED, *PASSED, *REFUSED}
    for key, value in config.items():
        if value and key not in known:
            told = f"{key}={str(value)[:60]} is unknown; {nearest(key, known)}"
            if strict:
                raise FileError(f"{told}; strict=False passes over it")
            notes.append(told)


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(n, str) and n for n in value):
        raise FileError(f"modules_to_save must be a list of names, got {str(value)[:80]!r}")
    return value


def _sort(
    tensors: Mapping[str, Tensor], saved: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Path -> its A and B, and module -> the numbers of its own copy."""
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for mark, what in _OTHER.items():
            if mark in key:
                raise FileError(f"{key!r} is {what}, which is not read")
        if not key.startswith(PREFIX):
            raise FileError(f"{key!r} does not begin with {PREFIX!r}")
        found = _PAIR.fullmatch(key, len(PREFIX))
        if found:
            if tensor.dim() != 2:
                raise FileError(f"{key!r} is {tuple(tensor.shape)}: only linear layers are read")
            pairs.setdefault(found["path"], {})[found["side"]] = tensor.float()
            continue
        module = _saved_module(key, saved)
        if module is None:
            raise FileError(f"{key!r} is neither lora_A nor lora_B, nor under modules_to_save")
        whole.setdefault(module, {})[key.removeprefix(f"{PREFIX}{module}.")] = tensor
    for path, pair in pairs.items():
        if len(pair) == 1:
            missing = "B" if "A" in pair else "A"
            raise FileError(f"'{PREFIX}{path}.lora_{missing}.weight' is missing")
    if not pairs:
        raise FileError("there is no lora_A and lora_B")
    return dict(sorted(pairs.items())), whole


def _saved_module(key: str, saved: list[str]) -> str | None:
    """The module that a key belongs to: PEFT takes every one whose path ends like a name listed."""
    parts = key.removeprefix(PREFIX).split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if any((PREFIX + path).endswith(name) for name in saved):
            return path
    return None


def _plan(
    pairs: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], notes: list[str]
) -> tuple[tuple[SiteShape, ...], dict[str, dict[str, Any]]]:
    sites, choices = [], {}
    for path, pair in pairs.items():
        A, B = pair["A"], pair["B"]
        rank, usual = A.shape[0], config.get("r", 8)
        meant = _matching(config.get("rank_pattern"), path) or [usual]
        if B.shape[1] != rank or rank not in meant:
            raise FileError(
                f"{path!r}: lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, while the "
                f"config gives it rank {meant[0]}"
            )
        alphas = _matching(config.get("alpha_pattern"), path) or [config.get("lora_alpha", 8)]
        if len(set(alphas)) > 1:
            notes.append(f"alpha_pattern gives {path!r} {alphas}: {alphas[0]} is taken, as in PEFT")
        if not math.isfinite(alpha := float(alphas[0])):
            raise FileError(f"{path!r}: alpha is {alpha}")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        sites.append(SiteShape(path, B.shape[0], A.shape[1]))
        choices[path] = {"rank": rank, "scale": scale}
    return tuple(sites), choices


def _matching(patterns: Any, path: str) -> list[Any]:
    """What the keys that match the end of the path say, in their order. PEFT takes the first, but
    sorts the keys when it saves: the one it trained with may be another, which shapes betray."""
    found = []
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", path):
                found.append(value)
        except re.error as error:
            raise FileError(f"pattern {key!r} is no regular expression: {error}") from error
    return found


def _beside(
    place: Path, held: TensorFile, notes: list[str]
) -> tuple[str | None, Fingerprint | None, Lineage | None]:
    """Name, base and lineage from our side file, if it lies there and belongs to these tensors."""
    path = place / SIDE
    if not path.exists():
        return None, None, None
    content = read_json(path)
    if content.get("sha256") != held.sha256:
        notes.append(f"{path} was written with other tensors than {TENSORS}: passed over")
        return None, None, None
    with blame(path):
        base = content["base"]
        return (
            str(content["name"]),
            None if base is None else Fingerprint.from_json(base, "finespun.json"),
            Lineage.from_json(content["lineage"], "finespun.json"),
        )
