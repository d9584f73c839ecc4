"""Adapters and checkpoints on disk: written whole or not at all, read with suspicion."""

from finespun.files.atomic import check_writable, settled, whole_folder, write_file
from finespun.files.checkpoint import (
    checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)

__all__ = [
    "check_writable",
    "checkpoints",
    "load_checkpoint",
    "random_state",
    "save_checkpoint",
    "set_random_state",
    "settled",
    "whole_folder",
    "write_file",
]
