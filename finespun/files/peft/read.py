"""Reading LoRA folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

Each site's scale is alpha / r, or alpha / √r with rsLoRA; rank_pattern and alpha_pattern give
single sites their own r and alpha, their keys being regular expressions for the end of a path.
DoRA, embeddings, convolutions, biases, modules saved whole and trained rows of tables (beside a
LoRA, or alone as PEFT's TRAINABLE_TOKENS) are read; what cannot be is refused by name. The paths in
the file decide where updates go. Format: PEFT 0.13 to 0.21.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finespun.adapters.packed import PackedTensors
from finespun.contract import Plan, SiteShape, Structure
from finespun.errors import FileError, StrictError, nearest
from finespun.files.native import Saved, blame, finite_number, named_after
from finespun.files.peft.keys import Pair, Parts, sort
from finespun.files.provenance.fingerprint import Fingerprint
from finespun.files.provenance.lineage import Lineage
from finespun.hosts import Entry
from finespun.methods.axes import make
from finespun.methods.structures.lora import LoRA
from finespun.storage.atomic import settled
from finespun.storage.patterns import check_pattern
from finespun.storage.safe_io import TensorFile, read_json, read_tensors

CONFIG, TENSORS, SIDE = "adapter_config.json", "adapter_model.safetensors", "finespun.json"
STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
BIASES = ("none", "all", "lora_only")
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
        "use_dora",
        "trainable_token_indices",
    ]
)
TOKENS_USED = frozenset(["peft_type", "token_indices", "init_weights"])
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
    "lora_bias",
    "use_qalora",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
    "ensure_weight_tying",
]


def read_peft(folder: str | Path, strict: bool = True) -> Saved:
    """A PEFT folder as a flat entry with a `LoRA`, `DoRA` or `Tokens` structure, named after the
    folder.

    With `strict` off, unknown keys of the config become notes. Raises FileError naming what is
    damaged, missing or not read.
    """
    place = settled(folder)
    config = read_json(place / CONFIG)
    notes: list[str] = []
    with blame(place / CONFIG):
        check_config(config, strict, notes)
        made = _structure(config)
    if not (place / TENSORS).exists() and (place / "adapter_model.bin").exists():
        raise FileError(
            f"{place} holds adapter_model.bin, which is pickled and not opened; save it again from "
            "PEFT with save_pretrained(..., safe_serialization=True)"
        )
    held = read_tensors(place / TENSORS)
    with blame(place / TENSORS):
        saved = _names(config.get("modules_to_save") or [])
        bias, dora = config.get("bias", "none") != "none", bool(config.get("use_dora"))
        parts = sort(held.tensors, saved, bias, dora)
        sites, choices, tensors = _plan(parts, config, notes)
    tensors |= {f"trained/{m}/{k}": t for m, state in parts.whole.items() for k, t in state.items()}
    name, base, lineage = _beside(place, held, notes)
    entry = Entry(
        name=name or named_after(folder),
        structure=made,
        plan=Plan(sites, choices),
        trained=tuple(parts.whole),
        flat=PackedTensors.pack(tensors),
    )
    return Saved(entry, base, lineage, held.sha256, tuple(notes), parts.base)


def _structure(config: Mapping[str, Any]) -> Structure:
    if config["peft_type"] == "TRAINABLE_TOKENS":
        return make("tokens", tokens=_indices(config.get("token_indices"), "token_indices"))
    told = LoRA(
        rank=config.get("r", 8),
        alpha=finite_number(config.get("lora_alpha", 8), "lora_alpha"),
        dropout=finite_number(config.get("lora_dropout", 0.0), "lora_dropout"),
        rslora=bool(config.get("use_rslora", False)),
    )
    if not config.get("use_dora"):
        return told
    alpha = told.scale * told.rank
    return make("dora", rank=told.rank, alpha=alpha, dropout=told.dropout)


def check_config(config: Mapping[str, Any], strict: bool, notes: list[str]) -> None:
    """Raise FileError for a config that says what is not read; unless strict, what is unknown
    becomes a note."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise FileError(f"peft_type is {str(kind)[:60]!r}, not 'LORA' or 'TRAINABLE_TOKENS'")
    refused = [k for k in REFUSED if config.get(k)]
    if config.get("bias", "none") not in BIASES:
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
    known = {*(USED if kind == "LORA" else TOKENS_USED), *PASSED, *REFUSED}
    for key, value in config.items():
        if value and key not in known:
            told = f"{key}={str(value)[:60]} is unknown; {nearest(key, known)}"
            if strict:
                raise StrictError(told)
            notes.append(told)


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(n, str) and n for n in value):
        raise FileError(f"modules_to_save must be a list of names, got {str(value)[:80]!r}")
    return value


def _indices(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise FileError(f"{where} must be a list of row numbers, got {str(value)[:80]!r}")
    return value


def _plan(
    parts: Parts, config: Mapping[str, Any], notes: list[str]
) -> tuple[tuple[SiteShape, ...], dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Sites, their choices and the tensors of their deltas. A choice that is `open` stands at a
    site of which the file does not tell the size: `fitting.settle` asks the model."""
    sites, choices, tensors = [], {}, dict[str, Tensor]()
    dotted = _dotted(parts, config)
    for path, pair in parts.pairs.items():
        site, choices[path] = settle_pair(path, pair, config, notes, dotted)
        sites.append(site)
        tensors |= {f"delta/{path}/{s}": getattr(pair, s) for s in ("A", "B")}
        if pair.m is not None:
            tensors[f"delta/{path}/m"] = pair.m
    _check_claims(parts, config, notes)
    for path, values in parts.tokens.items():
        tokens = _tokens(path, config)
        if len(tokens) != len(values) or path in choices:
            raise FileError(
                f"{path!r} has {len(values)} trained rows, the config names {len(tokens) or 'none'}"
                + (", and it carries a LoRA as well" if path in choices else "")
            )
        sites.append(SiteShape(path, values.shape[1], max(tokens, default=0) + 1, "embedding"))
        choices[path] = {"tokens": tokens, "open": True}
        tensors[f"delta/{path}/values"] = values
    for path, bias in parts.biases.items():
        if any(path == m or path.startswith(f"{m}.") for m in parts.whole):
            continue
        if path in choices:
            choices[path]["bias"] = True
        else:
            sites.append(SiteShape(path, len(bias), 1))
            choices[path] = {"only": "bias", "open": True}
        tensors[f"delta/{path}/b"] = bias
    return tuple(sites), choices, tensors


def _check_claims(parts: Parts, config: Mapping[str, Any], notes: list[str]) -> None:
    """What the config speaks of must be in the file; a bias may be missing, with a note."""
    key = "trainable_token_indices"
    if config.get(key) and not parts.tokens:
        raise FileError(f"the config has {key}={str(config[key])[:60]}, and no such rows are there")
    bias = config.get("bias", "none")
    if bias != "none" and not parts.biases:
        notes.append(f"bias={bias!r}, and no bias is there (PEFT left them out up to 0.20)")


def _tokens(path: str, config: Mapping[str, Any]) -> list[int]:
    """The row numbers that the config gives a table."""
    given = config.get("token_indices", config.get("trainable_token_indices"))
    if isinstance(given, dict):
        found = [name for name in given if path.endswith(name)]
        if not found:
            raise FileError(
                f"trainable_token_indices names no tokens for {path!r}; {nearest(path, given)}"
            )
        given = given[found[0]]
    return _indices([] if given is None else given, "trainable_token_indices")


def _dotted(parts: Parts, config: Mapping[str, Any]) -> bool:
    """Whether the ranks can only be those of PEFT 0.13, whose patterns began after a dot."""

    def told(dotted: bool) -> bool:
        pairs = parts.pairs.items()
        return all(p.A is None or len(p.A) in meant(config, n, dotted)[0] for n, p in pairs)

    return not told(False) and told(True)


def settle_pair(
    path: str,
    pair: Pair,
    config: Mapping[str, Any],
    notes: list[str],
    dotted: bool = False,
) -> tuple[SiteShape, dict[str, Any]]:
    """The site at `path`, and the rank and scale that the config gives it."""
    A, B = pair.A, pair.B
    if A is None or B is None:
        raise FileError(f"{path!r} lacks a factor")
    rank = A.shape[0]
    ranks, alphas = meant(config, path, dotted)
    if B.shape[1] != rank or rank not in ranks:
        raise FileError(
            f"{path!r}: lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, while the "
            f"config gives it rank {ranks[0]}"
        )
    if pair.m is not None and len(pair.m) != len(B):
        raise FileError(f"{path!r}: {len(pair.m)} magnitudes for {len(B)} outputs")
    if len(set(alphas)) > 1:
        notes.append(f"alpha_pattern gives {path!r} {alphas}: {alphas[0]} is taken, as in PEFT")
    alpha = finite_number(alphas[0], f"{path!r}: alpha")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    site = SiteShape(path, B.shape[0], A.shape[1], pair.kind)
    return site, {"rank": rank, "scale": scale}


def meant(
    config: Mapping[str, Any], path: str, dotted: bool = False
) -> tuple[list[Any], list[Any]]:
    """The ranks and the alphas that the config may mean at a path. Of PEFT 0.13's patterns the
    first that matches, of either kind, decides both."""
    told = _pattern(config, "rank_pattern"), _pattern(config, "alpha_pattern")
    if dotted:
        keys = {key: key for patterns in told for key in patterns}
        first = (_matching(keys, path, dotted) or [path])[0]
        found = [[patterns[first]] if first in patterns else [] for patterns in told]
    else:
        found = [_matching(patterns, path) for patterns in told]
    return found[0] or [config.get("r", 8)], found[1] or [config.get("lora_alpha", 8)]


def _pattern(config: Mapping[str, Any], option: str) -> dict[str, Any]:
    value = config.get(option) or {}
    if not isinstance(value, dict):
        raise FileError(
            f"{option} must be a table of expressions and numbers, as {{'q_proj': 4}}, got "
            f"{str(value)[:60]}"
        )
    return value


def _matching(patterns: dict[str, Any], path: str, dotted: bool = False) -> list[Any]:
    """What the keys that match the end of the path say, in their order. PEFT takes the first, but
    sorts the keys when it saves: the one it trained with may be another, which shapes betray."""
    found = []
    for key, value in patterns.items():
        check_pattern(key, path)
        if re.match(rf".*\.{key}$" if dotted else rf"(.*\.)?({key})$", path):
            found.append(value)
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
