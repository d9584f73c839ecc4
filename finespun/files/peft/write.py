"""The two files of a LoRA in PEFT's format, and our side file beside them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from finespun.adapters.fingerprint import Fingerprint
from finespun.adapters.lineage import Lineage
from finespun.files.peft.full_form import FullForm
from finespun.files.peft.keys import PREFIX
from finespun.files.peft.read import CONFIG, SIDE, TENSORS
from finespun.files.provenance.model_card import model_card, write_card
from finespun.linalg import LowRank
from finespun.storage.atomic import whole_folder
from finespun.storage.safe_io import write_json, write_tensors


def lora_config(
    ranks: Mapping[str, int],
    targets: Sequence[str] | str,
    trained: Sequence[str] = (),
    source: str = "",
    task: str | None = None,
    transposed: bool = False,
) -> dict[str, Any]:
    """The content of adapter_config.json for sites of these ranks, with every scale 1.

    Sites whose rank is below the largest are listed in rank_pattern and alpha_pattern, by whole
    names. `transposed`: the layers store (in, out), as transformers' Conv1D.
    """
    most = max(ranks.values())
    patterns = {f"^{re.escape(n)}": r for n, r in ranks.items() if r != most}
    return {
        "alpha_pattern": patterns,
        "auto_mapping": None,
        "base_model_name_or_path": source,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "modules_to_save": list(trained) or None,
        "peft_type": "LORA",
        "r": most,
        "rank_pattern": patterns,
        "revision": None,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
    }


def tokens_config(
    tokens: Sequence[int], targets: Sequence[str], source: str = ""
) -> dict[str, Any]:
    """The content of adapter_config.json where rows of tables are trained and nothing else."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": source,
        "inference_mode": True,
        "init_weights": True,
        "peft_type": "TRAINABLE_TOKENS",
        "revision": None,
        "target_modules": list(targets),
        "task_type": None,
        "token_indices": list(tokens),
    }


def write_lora(
    folder: str | Path,
    name: str,
    updates: Mapping[str, LowRank],
    config: Mapping[str, Any],
    trained: Mapping[str, Tensor],
    base: Fingerprint | None,
    lineage: Lineage,
    error: float,
    form: FullForm | None = None,
) -> None:
    """Write ΔW of every site at the rank that `config` gives it, zeros filling up, and the tensors
    `trained` by their names in the model; `form` where not all sites are plain linear layers.
    Raises FileError where the folder cannot be written."""
    form = form or FullForm()
    own = {key.removeprefix("^"): rank for key, rank in config.get("rank_pattern", {}).items()}
    tensors: dict[str, Tensor] = {}
    for site, update in updates.items():
        rank = own.get(re.escape(site), config["r"])
        small = update.squeeze(rank) if update.rank > rank else update
        tensors |= form.factors(site, small, rank)
    for key, value in {**trained, **form.tensors}.items():
        tensors[f"{PREFIX}{key}"] = value.float() if value.is_floating_point() else value
    with whole_folder(folder, sum(t.nbytes for t in tensors.values()) + (1 << 20)) as work:
        digest = write_tensors(work / TENSORS, tensors, {"format": "pt"})
        write_json(work / CONFIG, config)
        side = {"format": 1, "name": name, "sha256": digest, "relative_error": error}
        side["base"] = None if base is None else base.as_json()
        write_json(work / SIDE, {**side, "lineage": lineage.as_json()})
        write_card(work, folder, model_card(name, tensors, base, lineage, "peft"))
