"""A LoRA in other libraries' files: the factors of one layer, and what a config says of them.

Each site's scale is alpha / r, or alpha / √r with rsLoRA; rank_pattern and alpha_pattern give
single sites their own r and alpha, their keys being regular expressions for the end of a path.
Format: PEFT 0.13 to 0.21, whose config diffusers' metadata repeats.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finespun.contract import SiteShape
from finespun.errors import FileError, StrictError, nearest
from finespun.storage.blame import finite_number
from finespun.storage.patterns import check_pattern

STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
FROM_WEIGHT = ("pissa", "olora")  # what follows from the base's weight alone
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


@dataclass
class Pair:
    """One layer's LoRA: A (r, in), B (out, r), and DoRA's magnitudes m (out,) where it has them."""

    kind: str
    A: Tensor | None = None
    B: Tensor | None = None
    m: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        held = {"A": self.A, "B": self.B, "m": self.m}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


def check_config(
    config: Mapping[str, Any], strict: bool, notes: list[str], based: bool = False
) -> None:
    """Raise FileError for a config that says what is not read; unless strict, what is unknown
    becomes a note. With `based` the base is at hand, and starts that follow from it are read."""
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
    if start not in STARTS and not (based and start in FROM_WEIGHT):
        way = "load it onto its base with fs.load, or " if start in FROM_WEIGHT else ""
        raise FileError(
            f"init_lora_weights={start!r} changes the base's own weights when PEFT loads it; "
            f"{way}save it from PEFT with path_initial_model_for_weight_conversion"
        )
    known = {*(USED if kind == "LORA" else TOKENS_USED), *PASSED, *REFUSED}
    for key, value in config.items():
        if value and key not in known:
            told = f"{key}={str(value)[:60]} is unknown; {nearest(key, known)}"
            if strict:
                raise StrictError(told)
            notes.append(told)


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


def through(core: Tensor, A: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(r, in·k) of a core (r, q, k, ...) and A (q, in), and the kernel (in, k, ...)."""
    whole = torch.einsum("iq...,qj->ij...", core, A)
    return whole.flatten(1), tuple(whole.shape[1:])
