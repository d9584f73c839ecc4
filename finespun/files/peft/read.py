"""Reading LoRA folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

Each site's scale is alpha / r, or alpha / √r with rsLoRA; rank_pattern and alpha_pattern give
single sites their own r and alpha, their keys being regular expressions for the end of a path.
DoRA, embeddings, convolutions, biases, modules saved whole and trained rows of tables (beside a
LoRA, or alone as PEFT's TRAINABLE_TOKENS) are read; what cannot be is refused by name. The paths in
the file decide where updates go. Format: PEFT 0.13 to 0.21.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finespun.adapters.fingerprint import Fingerprint
from finespun.adapters.keys import Key, of_module, of_site
from finespun.adapters.lineage import Lineage
from finespun.adapters.state import AdapterState
from finespun.contract import Plan, SiteShape, Structure
from finespun.errors import FileError, nearest
from finespun.files.lora import FROM_WEIGHT, check_config, meant, settle_pair
from finespun.files.peft.keys import Parts, sort
from finespun.files.peft.starts import starts
from finespun.files.saved import Saved, named_after
from finespun.methods.axes import make
from finespun.methods.structures.lora import LoRA
from finespun.storage.atomic import settled
from finespun.storage.blame import blame, finite_number
from finespun.storage.safe_io import TensorFile, read_json, read_tensors

CONFIG, TENSORS, SIDE = "adapter_config.json", "adapter_model.safetensors", "finespun.json"


def read_peft(folder: str | Path, strict: bool = True, model: nn.Module | None = None) -> Saved:
    """A PEFT folder as a state with a `LoRA`, `DoRA` or `Tokens` structure, named after the
    folder.

    With `strict` off, unknown keys of the config become notes. With the base, `model`, starts that
    follow from its weights (PiSSA's, OLoRA's) are found again. Raises FileError naming what is
    damaged, missing or not read.
    """
    place = settled(folder)
    config = read_json(place / CONFIG)
    notes: list[str] = []
    with blame(place / CONFIG):
        check_config(config, strict, notes, based=model is not None)
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
        plan, start = Plan(sites, choices), config.get("init_lora_weights", True)
        if model is not None and start in FROM_WEIGHT:
            tensors |= starts(model, start, made, plan, notes)
    for module, whole in parts.whole.items():
        tensors |= of_module(module, whole)
    name, base, lineage = _beside(place, held, notes)
    state = AdapterState.pack(
        name or named_after(folder),
        made,
        plan,
        tensors,
        trained=tuple(parts.whole),
        lineage=lineage,
        base=base,
    )
    return Saved(state, held.sha256, tuple(notes), parts.base)


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
) -> tuple[tuple[SiteShape, ...], dict[str, dict[str, Any]], dict[Key, Tensor]]:
    """Sites, their choices and the tensors of their deltas. A choice that is `open` stands at a
    site whose size the file does not give: `check_fit.settle` asks the model."""
    sites, choices, tensors = [], {}, dict[Key, Tensor]()
    dotted = _dotted(parts, config)
    for path, pair in parts.pairs.items():
        site, choices[path] = settle_pair(path, pair, config, notes, dotted)
        sites.append(site)
        tensors |= of_site(path, pair.tensors())
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
        tensors[Key("site", path, "values")] = values
    for path, bias in parts.biases.items():
        if any(path == m or path.startswith(f"{m}.") for m in parts.whole):
            continue
        if path in choices:
            choices[path]["bias"] = True
        else:
            sites.append(SiteShape(path, len(bias), 1))
            choices[path] = {"only": "bias", "open": True}
        tensors[Key("site", path, "b")] = bias
    return tuple(sites), choices, tensors


def _check_claims(parts: Parts, config: Mapping[str, Any], notes: list[str]) -> None:
    """What the config names must be in the file; a bias may be missing, with a note."""
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
