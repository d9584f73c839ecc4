"""One process at a time works in a folder: a lock beside it that says whose it is.

The lock is the system's own (flock), so it ends with the process, however that ends; the text in
the file serves only to say who holds it. Where the file system or the platform has no such locks,
nothing is locked.
"""

import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finespun.errors import FileError
from finespun.storage.atomic import located

OWNER_BYTES = 4096


def lock_file(folder: str | Path) -> Path:
    """The file beside `folder` whose lock is the folder's."""
    target = located(folder)
    return target.with_name(f".{target.name}.lock")


@contextmanager
def locked(folder: str | Path, purpose: str) -> Iterator[None]:
    """Hold the lock of `folder` for a purpose such as "a run". Raises FileError naming the process
    that holds it: its number, its machine, since when and what for."""
    path = lock_file(folder)
    missing = [place for place in path.parents if not place.exists()]
    held = _take(path, purpose)
    try:
        yield
    finally:
        if held is not None:
            path.unlink(missing_ok=True)
            os.close(held)
        for place in missing:
            with suppress(OSError):  # it holds work now
                place.rmdir()


def _told(descriptor: int, path: Path) -> str:
    """Who holds a lock, from the text that the holder wrote."""
    try:
        owner = json.loads(os.pread(descriptor, OWNER_BYTES, 0))
        words = [str(owner[key])[:80] for key in ("purpose", "process", "machine", "since")]
    except (ValueError, LookupError, TypeError, RecursionError):
        return f"another process, which {path} does not name"
    purpose, process, machine, since = (
        "".join(c if c.isprintable() else "?" for c in word) for word in words
    )
    return f"{purpose} of process {process} on {machine}, since {since}"


def _owner(purpose: str) -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    machine = socket.gethostname()
    owner = {"purpose": purpose, "process": os.getpid(), "machine": machine, "since": since}
    return json.dumps(owner).encode()


if sys.platform == "win32":

    def _take(path: Path, purpose: str) -> int | None:
        """Folders are not locked here."""
        return None

else:
    import fcntl

    def _take(path: Path, purpose: str) -> int | None:
        """The open lock; None where the file system has no locks."""
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                descriptor = os.open(path, flags, 0o644)
            except OSError as error:
                raise FileError(f"{path} cannot be made: {error.strerror}") from error
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise FileError(f"{path} cannot be made: it is there and no regular file")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = _told(descriptor, path)
                os.close(descriptor)
                raise FileError(
                    f"{str(path.parent / path.name[1:-5])!r} is in use by {owner}: wait for it, or "
                    "name another folder"
                ) from error
            except OSError:
                os.close(descriptor)
                return None
            if _is_still(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _owner(purpose), 0)
                return descriptor
            os.close(descriptor)  # its holder ended and took it away before it was ours

    def _is_still(path: Path, descriptor: int) -> bool:
        try:
            there, ours = path.stat(follow_symlinks=False), os.fstat(descriptor)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
