"""Writing LoRA files that diffusers, kohya's scripts and the programs beside them load.

Every scale is folded into B, so that alpha is the rank: a reader that has it from `.alpha`, from
diffusers' metadata or takes it for granted computes the same ΔW = B A. A convolution's A keeps its
kernel, (r, in, k, ...), and its B is a 1x1 kernel.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finespun.adapters.fingerprint import Fingerprint
from finespun.adapters.lineage import Lineage
from finespun.errors import InputError, nearest
from finespun.files.diffusion.names import KOHYA, PIPELINE_PARTS, Style
from finespun.files.diffusion.read import METADATA, OURS, WEIGHTS
from finespun.hosts import Attached, fingerprint, modules
from finespun.linalg import LowRank
from finespun.storage.atomic import write_file

TEXT_MODEL = "text_model."
CLASSES = (
    (re.compile(r"UNet\w*"), "unet"),
    (re.compile(r"\w*Transformer\w*Model"), "transformer"),
    (re.compile(r"CLIPTextModel"), "text_encoder"),
)


@dataclass(frozen=True)
class Update:
    """ΔW of one layer: the part of the pipeline, the path in it (without a part: the name that
    stands in the file), its kernel (in, k, ...) where it is a convolution, and the rank to write.
    """

    part: str
    path: str
    factors: LowRank
    rank: int
    kernel: tuple[int, ...] = ()

    def name(self, style: Style) -> str:
        """The layer's name in a file. Text encoders keep the `text_model.` that both formats
        have."""
        path = self.path
        if style == "kohya" and not self.part:
            return path
        if self.reads_text and path.startswith("encoder.layers."):
            path = f"{TEXT_MODEL}{path}"
        if style == "diffusers":
            return f"{self.part}.{path}" if self.part else path
        return f"{KOHYA[self.part]}_{path.replace('.', '_')}"

    def keys(self, style: Style) -> tuple[str, str]:
        """The keys of A and B. diffusers reads text encoders in words of their own."""
        down, up = ("lora_A", "lora_B") if style == "diffusers" else ("lora_down", "lora_up")
        if style == "diffusers" and self.reads_text:
            down, up = "lora_linear_layer.down", "lora_linear_layer.up"
        name = self.name(style)
        return f"{name}.{down}.weight", f"{name}.{up}.weight"

    @property
    def pattern(self) -> str:
        """A regular expression for the module's name in diffusers' pipeline."""
        name = self.name("diffusers").removeprefix(f"{self.part}.")
        if self.reads_text and name.startswith(TEXT_MODEL):
            return f"({re.escape(TEXT_MODEL)})?{re.escape(name.removeprefix(TEXT_MODEL))}"
        return re.escape(name)

    @property
    def reads_text(self) -> bool:
        return self.part.startswith("text_encoder")


def split_name(
    name: str, base: Fingerprint | None, part: str | None, style: Style
) -> tuple[str, str]:
    """The part of the pipeline that a layer belongs to, and its path there: the part named, else
    what the base's class implies, else the first word of the layer's own name. Raises InputError
    where that is not known."""
    known = PIPELINE_PARTS if style == "diffusers" else tuple(KOHYA)
    if part is not None:
        if part not in known:
            raise InputError(f"part={part!r} is no part that {style} names; {nearest(part, known)}")
        return part, name
    architecture = "" if base is None else base.architecture
    for pattern, found in CLASSES:
        if pattern.fullmatch(architecture):
            return found, name
    first, _, rest = name.partition(".")
    if first in known and rest:
        return first, rest
    told = f"a {architecture}" if architecture else "a base that is not known"
    raise InputError(
        f"the adapter is for {told}: say which part of the pipeline that is, as part='unet' (on "
        f"the command line --part); known: {', '.join(known)}"
    )


def write_adapter(
    model: nn.Module,
    adapter: Attached,
    updates: Mapping[str, LowRank],
    ranks: Mapping[str, int],
    path: str | Path,
    style: Style,
    part: str | None,
    lineage: Lineage,
    error: float,
) -> Path:
    """Write the updates of a model's adapter by its layers' names; returns the file's path."""
    goal, base, known = target(path, style), fingerprint(model, adapter.trained), modules(model)
    parts = []
    for name, factors in updates.items():
        size = known[name].get_parameter("weight").shape[1:]
        kernel = tuple(size) if len(size) > 1 else ()
        where = split_name(name, base, part, style)
        parts.append(Update(*where, factors, ranks[name], kernel))
    write_diffusion(goal, style, parts, adapter.name, base, lineage, error)
    return goal


def target(path: str | Path, style: Style) -> Path:
    """The file to write: `path` itself where it ends in .safetensors, else diffusers' own name in
    the folder `path`. Raises InputError for kohya's format, which has no such name."""
    place = Path(path).expanduser()
    if place.suffix == ".safetensors":
        return place
    if style == "kohya":
        raise InputError(f"kohya's format is one file: name it, such as {place.name}.safetensors")
    return place / WEIGHTS


def write_diffusion(
    path: Path,
    style: Style,
    updates: list[Update],
    name: str,
    base: Fingerprint | None,
    lineage: Lineage,
    error: float,
) -> str:
    """Write one file, whole or not at all, and return its sha256; zeros fill up to each layer's
    rank. Raises InputError where two layers have one name, FileError where it cannot be written."""
    tensors: dict[str, Tensor] = {}
    seen: dict[str, str] = {}
    for update in updates:
        key = update.name(style)
        if key in seen:
            raise InputError(f"{update.path!r} and {seen[key]!r} are both {key!r} in this format")
        seen[key] = update.path
        tensors |= zip(update.keys(style), _padded(update))
        if style == "kohya":
            tensors[f"{key}.alpha"] = torch.tensor(float(update.rank))
    told = {"name": name, "base": None if base is None else base.as_json(), "relative_error": error}
    metadata = {"format": "pt", OURS: json.dumps({**told, "lineage": lineage.as_json()})}
    metadata |= _kohya_metadata(updates) if style == "kohya" else _metadata(updates)
    data = safetensors.torch.save(tensors, metadata)
    write_file(path, data)
    return hashlib.sha256(data).hexdigest()


def _padded(update: Update) -> tuple[Tensor, Tensor]:
    factors, rank = update.factors, update.rank
    small = factors.squeeze(rank) if factors.rank > rank else factors
    A = F.pad(small.A.float(), (0, 0, 0, rank - small.rank)).contiguous()
    B = F.pad(small.B.float(), (0, rank - small.rank)).contiguous()
    if not update.kernel:
        return A, B
    return A.view(rank, *update.kernel), B.view(*B.shape, *[1] * (len(update.kernel) - 1))


def _metadata(updates: list[Update]) -> dict[str, str]:
    """What diffusers passes to PEFT's LoraConfig, for each part of the pipeline."""
    told: dict[str, Any] = {}
    for part in dict.fromkeys(u.part for u in updates):
        own = {u.pattern: u.rank for u in updates if u.part == part}
        most = max(own.values())
        patterns = {f"^{n}": r for n, r in own.items() if r != most}
        config = {
            "r": most,
            "lora_alpha": most,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": "|".join(sorted(own)),
        }
        told |= {f"{part}.{k}" if part else k: v for k, v in config.items()}
    return {METADATA: json.dumps(told, indent=2, sort_keys=True)}


def _kohya_metadata(updates: list[Update]) -> dict[str, str]:
    most = str(max(u.rank for u in updates))
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": most,
        "ss_network_alpha": most,
    }
