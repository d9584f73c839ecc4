"""Folders and files that are written whole or not at all.

A write goes to a temporary sibling, is flushed to the disk and takes its name by rename. Where a
folder with that name stands already, it steps aside first, under a hidden name, and goes only when
the new one is in place: a crash at any moment leaves the old or the new one, whole.
"""

import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finespun.errors import FileError, InputError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOENT: "the file system takes no files there",
    errno.EROFS: "the file system is read-only",
    errno.EBUSY: "the folder is a mount point or in use; name a folder inside it",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the disk reports an error",
}
TRIES = 100


@contextmanager
def whole_folder(path: str | os.PathLike[str], bytes_needed: int = 0) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving, its files take their place in `path` at once.

    Other files that `path` holds stay in it. On an exception nothing changes. Raises FileError
    where `path` cannot be written, has less than `bytes_needed` free, or is not a folder.
    """
    target = located(path)
    if target.exists() and not target.is_dir():
        raise FileError(f"{target} is a file; name a folder")
    check_own_folder(target)
    check_writable(target, bytes_needed)
    with _told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        _sweep(target.parent)
        work, lock = _claim(target, Path.mkdir)
        try:
            yield work
            _swap(work, target)
        finally:
            if lock is not None:
                os.close(lock)
            shutil.rmtree(work, ignore_errors=True)


def write_file(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write one file whole or not at all; text as UTF-8. Raises FileError like `whole_folder`."""
    target = located(path)
    if target.is_dir():
        raise FileError(f"{target} is a folder; name a file")
    content = data.encode() if isinstance(data, str) else data
    check_writable(target, len(content))
    with _told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        work, lock = _claim(target, Path.touch)
        try:
            work.write_bytes(content)
            _flush(work)
            os.replace(work, target)
        finally:
            if lock is not None:
                os.close(lock)
            work.unlink(missing_ok=True)
        _flush(target.parent)


def check_own_folder(target: Path) -> None:
    """Raise FileError for the folder one is in and those above: they cannot step aside."""
    if target in (Path.cwd(), *Path.cwd().parents):
        raise FileError(
            f"{target} holds the folder you are working in; name a folder of its own, such as "
            f"{target / 'adapter'}"
        )


def check_writable(path: str | os.PathLike[str], bytes_needed: int = 0) -> None:
    """Raise FileError now if writing `path` later would fail: no permission, a read-only file
    system, a file where a folder should be, or less than `bytes_needed` bytes free."""
    target = located(path)
    with _told(target):
        above = next(p for p in target.parents if p.exists())
    if not above.is_dir():
        raise FileError(f"{target} cannot be made: {above} is a file")
    with _told(target):
        tempfile.TemporaryFile(dir=above).close()
        free = shutil.disk_usage(above).free
    if free < bytes_needed:
        raise FileError(
            f"{target} needs {bytes_needed:,} bytes and the disk has {free:,} free; make room or "
            "name another disk"
        )


def located(path: str | os.PathLike[str]) -> Path:
    """The absolute path, links followed and ~ expanded. Raises InputError for what is no path,
    FileError for a name that the file system does not take."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{path!r} is no path; give one as text, such as 'out/adapter'")
    if not os.fspath(path):
        raise InputError("'' is no path; the folder you are in is '.'")
    try:
        target = Path(path).expanduser().resolve()
        with _told(target):
            target.exists()
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{str(path)!r} is no path: {error}") from error
    return target


def settled(path: str | os.PathLike[str]) -> Path:
    """Where to read the folder `path`: itself, or what a crash left of it under the hidden name."""
    target = located(path)
    aside = _aside(target)
    return aside if aside.is_dir() and not target.exists() else target


def recover(path: str | os.PathLike[str]) -> None:
    """Give a folder its name back if a crash came between the two renames of a replacement."""
    target = located(path)
    if settled(target) != target:
        os.rename(_aside(target), target)


def put_aside(folder: Path) -> list[Path]:
    """The folders below `folder` that a crash left without their name, by that name."""
    hidden = [p for p in folder.glob(".?*.previous") if p.is_dir()]
    names = [folder / p.name.removeprefix(".").removesuffix(".previous") for p in hidden]
    return [n for n in names if not n.exists()]


def remove_folder(folder: Path) -> None:
    """Delete a folder that nobody may see half deleted."""
    work = _temporary(folder)
    os.rename(folder, work)
    shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        _flush_all(work)
        os.rename(work, target)
    else:
        aside = _aside(target)
        if aside.exists():
            remove_folder(aside)
        _carry(target, work)
        _keep_owner(target, work)
        _flush_all(work)
        os.rename(target, aside)
        try:
            os.rename(work, target)
        except OSError:
            os.rename(aside, target)
            raise
        _carry(aside, target)
        remove_folder(aside)
    _flush(target.parent)


def _carry(old: Path, new: Path) -> None:
    """Give `new` what only `old` holds, by hard links where the file system has them."""
    for item in old.iterdir():
        place = new / item.name
        if os.path.lexists(place):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, place, symlinks=True, copy_function=_link)
            for inner in (item, *(p for p in item.rglob("*") if p.is_dir() and not p.is_symlink())):
                _keep_owner(inner, place / inner.relative_to(item))
        else:
            _link(item, place)


def _keep_owner(old: Path, new: Path) -> None:
    """Give a folder the mode, the owner and the group of the one whose place it takes. Raises
    OSError where the system does not let this process give it away."""
    found = old.stat()
    if sys.platform != "win32" and (found.st_uid, found.st_gid) != (
        new.stat().st_uid,
        new.stat().st_gid,
    ):
        os.chown(new, found.st_uid, found.st_gid)
    os.chmod(new, stat.S_IMODE(found.st_mode))


def _link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def unfinished(name: str) -> bool:
    """Whether a file or folder of this name is what a writer that was killed left."""
    return name.startswith(".") and ".writing-" in name


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.writing-{secrets.token_hex(6)}")


def _claim(target: Path, make: Callable[[Path], None]) -> tuple[Path, int | None]:
    """A new temporary file or folder, and the lock that says it has a writer."""
    for _ in range(TRIES):
        work = _temporary(target)
        make(work)
        try:
            lock = _hold(work)
        except (BlockingIOError, FileNotFoundError):
            continue  # swept by another writer before it was locked
        if work.exists():
            return work, lock
        if lock is not None:
            os.close(lock)
    raise FileError(f"{target}: other writers took the temporary folder away {TRIES} times")


def _sweep(folder: Path) -> None:
    """Delete what writers that are gone left in `folder`."""
    for work in folder.glob(".?*.writing-*"):
        try:
            lock = _hold(work)
        except (BlockingIOError, FileNotFoundError):
            continue
        if lock is not None or _a_day_old(work):
            _delete(work)
        if lock is not None:
            os.close(lock)


def _a_day_old(work: Path) -> bool:
    """What stands for a lock on file systems that have none."""
    try:
        return time.time() - work.stat().st_mtime > 86400
    except FileNotFoundError:
        return False


def _delete(work: Path) -> None:
    if work.is_dir():
        shutil.rmtree(work, ignore_errors=True)
    else:
        work.unlink(missing_ok=True)


if sys.platform == "win32":

    def _hold(work: Path) -> int | None:
        """Folders cannot be locked here."""
        return None

    def _flush(path: Path) -> None:
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())

else:
    import fcntl

    def _hold(work: Path) -> int | None:
        """An open lock that ends with the process; None where the file system has no locks.
        Raises BlockingIOError where somebody else holds it."""
        descriptor = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def _flush(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _flush_all(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            file = Path(place, name)
            if file.is_file() and not file.is_symlink():
                _flush(file)
        _flush(Path(place))


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Say what the operating system's refusal means for this path."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise
        raise FileError(
            f"{target} cannot be written: {reason} ({error.strerror}). What was there before is "
            "untouched"
        ) from error
