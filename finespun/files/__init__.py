"""Adapters and checkpoints on disk: written whole or not at all, read with suspicion."""

from finespun.files.check_fit import check_fit, register_saved, settle
from finespun.files.detect import check_source, offering_lenience, read_adapter, read_for
from finespun.files.export import Exported, Format, export
from finespun.files.native import Saved, save, write
from finespun.files.overwrite import refuse_to_lose
from finespun.files.peft.summary import Told, tell
from finespun.files.peft.write import lora_config, write_lora
from finespun.files.provenance.fingerprint import Fingerprint, check_base, fingerprint
from finespun.files.provenance.lineage import Lineage, Parent, lineage_of

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
    "export",
    "fingerprint",
    "lineage_of",
    "lora_config",
    "offering_lenience",
    "read_adapter",
    "read_for",
    "refuse_to_lose",
    "register_saved",
    "save",
    "settle",
    "tell",
    "write",
    "write_lora",
]
