"""Two states of free memory: given back to the system, or kept by the allocator."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

GLIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
USUAL, MOST = 128 * 1024, 2**31 - 1


def give_back() -> None:
    """Return free memory to the system, so that the next user pays for fresh pages: as when a
    process merges for the first time."""
    if GLIBC is not None and hasattr(GLIBC, "malloc_trim"):
        GLIBC.malloc_trim(0)


@contextmanager
def kept() -> Iterator[None]:
    """Inside, freed memory stays with the process: as when it has merged and unmerged before."""
    if GLIBC is None or not hasattr(GLIBC, "mallopt"):
        yield
        return
    GLIBC.mallopt(TRIM_THRESHOLD, MOST)
    GLIBC.mallopt(MMAP_THRESHOLD, 2**25)
    try:
        yield
    finally:
        GLIBC.mallopt(TRIM_THRESHOLD, USUAL)
        GLIBC.mallopt(MMAP_THRESHOLD, USUAL)
