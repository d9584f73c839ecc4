"""Adapters and checkpoints on disk: written whole or not at all, read with suspicion."""

from finespun.adapters.fingerprint import Fingerprint
from finespun.adapters.lineage import Lineage, Parent, lineage_of
from finespun.files.check_fit import check_fit, register_saved, settle
from finespun.files.detect import check_source, offering_lenience, read_adapter, read_for
from finespun.files.export import Exported, Format, export
from finespun.files.native import save, state_of, write
from finespun.files.overwrite import refuse_to_lose
from finespun.files.peft.summary import FileSummary, summarise
from finespun.files.peft.write import lora_config, write_lora
from finespun.files.saved import Saved
from finespun.files.sources import alike, sources
from finespun.hosts import check_base, fingerprint

__all__ = [
    "Exported",
    "FileSummary",
    "Fingerprint",
    "Format",
    "Lineage",
    "Parent",
    "Saved",
    "alike",
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
    "sources",
    "state_of",
    "summarise",
    "write",
    "write_lora",
]
