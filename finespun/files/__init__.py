"""Adapters and checkpoints on disk: written whole or not at all, read with suspicion."""

from finespun.files.atomic import check_writable, settled, whole_folder, write_file
from finespun.files.checkpoint import (
    checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from finespun.files.export import Exported, Format, export
from finespun.files.fingerprint import Fingerprint, check_base, fingerprint
from finespun.files.fitting import check_fit, register_saved, settle
from finespun.files.keep import refuse_to_lose
from finespun.files.lineage import Lineage, Parent, lineage_of
from finespun.files.lora_folder import lora_config, write_lora
from finespun.files.native import Saved, save, write
from finespun.files.peft_told import Told, tell
from finespun.files.reading import check_source, offering_lenience, read_adapter, read_for

__all__ = [
    "Exported",
    "Fingerprint",
    "Format",
    "Lineage",
    "Parent",
    "Saved",
    "Told",
    "check_base",
    "check_fit",
    "check_source",
    "check_writable",
    "checkpoints",
    "export",
    "fingerprint",
    "lineage_of",
    "load_checkpoint",
    "lora_config",
    "offering_lenience",
    "random_state",
    "read_adapter",
    "read_for",
    "refuse_to_lose",
    "register_saved",
    "save",
    "save_checkpoint",
    "set_random_state",
    "settle",
    "settled",
    "tell",
    "whole_folder",
    "write",
    "write_file",
    "write_lora",
]
