"""Folders and files appear whole or not at all, whatever happens on the way."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finespun.errors import FileError, InputError
from finespun.storage.atomic import check_writable, recover, settled, whole_folder, write_file

STEPS = ("rename", "mkdir", "fsync", "link", "unlink", "rmdir", "replace", "open")


def put(folder: Path, word: str) -> None:
    with whole_folder(folder) as work:
        (work / "a").write_text(word)
        (work / "b").write_text(word)


def held(folder: Path) -> tuple[str, str]:
    place = settled(folder)
    return (place / "a").read_text(), (place / "b").read_text()


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def in_a_child(work: Callable[[], None], die_at: int) -> bool:
    """Run `work` in a child that is gone, without any clean-up, before its `die_at`-th call to the
    file system; True if it came to its end before."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(call):
            def inner(*args, **kwargs):
                nonlocal count
                count += 1
                if count > die_at:
                    os._exit(9)
                return call(*args, **kwargs)

            return inner

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(7)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


def test_a_new_folder_appears_with_all_its_files(tmp_path):
    put(tmp_path / "deep" / "down" / "x", "one")
    assert held(tmp_path / "deep" / "down" / "x") == ("one", "one")
    assert hidden(tmp_path / "deep" / "down") == []


def test_an_exception_changes_nothing(tmp_path):
    put(tmp_path / "x", "one")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "x") as work:
        (work / "a").write_text(str(1 / 0))
    assert held(tmp_path / "x") == ("one", "one")
    assert hidden(tmp_path) == []


def test_a_crash_at_any_call_leaves_the_old_or_the_new_whole(tmp_path):
    finished, seen = False, set()
    for die_at in range(200):
        folder = tmp_path / str(die_at) / "x"
        put(folder, "old")
        (folder / "mine.txt").write_text("mine")
        finished = in_a_child(lambda folder=folder: put(folder, "new"), die_at)
        first, second = held(folder)
        assert first == second
        assert first in ("old", "new")
        assert (settled(folder) / "mine.txt").read_text() == "mine"
        seen.add(first)
        put(folder, "next")
        assert held(folder) == ("next", "next")
        assert (folder / "mine.txt").read_text() == "mine"
        assert hidden(folder.parent) == []
        if finished:
            break
    assert finished
    assert seen == {"old", "new"}


def test_a_crash_at_any_call_of_a_first_write_leaves_nothing_or_all(tmp_path):
    finished = False
    for die_at in range(100):
        folder = tmp_path / str(die_at) / "x"
        finished = in_a_child(lambda folder=folder: put(folder, "new"), die_at)
        if folder.exists():
            assert held(folder) == ("new", "new")
        if finished:
            break
    assert finished
    assert folder.exists()


def test_between_the_two_renames_the_old_is_found_and_recovered(tmp_path):
    folder = tmp_path / "x"
    put(folder, "old")
    folder.rename(tmp_path / ".x.previous")
    assert held(folder) == ("old", "old")
    recover(folder)
    assert (folder / "a").read_text() == "old"
    assert hidden(tmp_path) == []


def test_what_else_lies_in_the_folder_stays(tmp_path):
    folder = tmp_path / "x"
    (folder / "logs" / "deep").mkdir(parents=True)
    (folder / "logs" / "deep" / "log").write_text("lines")
    (folder / "recipe.yaml").write_text("recipe")
    (folder / "link").symlink_to("recipe.yaml")
    with (folder / "recipe.yaml").open("a") as still_open:
        put(folder, "one")
        still_open.write(", more")
    assert held(folder) == ("one", "one")
    assert (folder / "recipe.yaml").read_text() == "recipe, more"
    assert (folder / "logs" / "deep" / "log").read_text() == "lines"
    assert os.readlink(folder / "link") == "recipe.yaml"


def test_where_hard_links_are_not_allowed_files_are_copied(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "no links here")

    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "other").write_text("other")
    monkeypatch.setattr(os, "link", refuse)
    put(tmp_path / "x", "one")
    assert (tmp_path / "x" / "other").read_text() == "other"


def test_what_dead_writers_left_goes_and_what_living_ones_hold_stays(tmp_path):
    (tmp_path / ".x.writing-0123").mkdir()
    (tmp_path / ".y.writing-4567").mkdir()
    (tmp_path / ".z.writing-89ab").write_text("half a file")
    with whole_folder(tmp_path / "x") as mine:
        (mine / "a").write_text("a")
        put(tmp_path / "x", "other")
        write_file(tmp_path / "file", "other")
        assert hidden(tmp_path) == [mine.name]
    assert hidden(tmp_path) == []
    assert (tmp_path / "x" / "b").read_text() == "other"


def test_where_nothing_can_be_locked_a_day_must_pass(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / ".x.writing-0123").mkdir()
    (tmp_path / ".y.writing-4567").mkdir()
    os.utime(tmp_path / ".y.writing-4567", (0, 0))
    put(tmp_path / "x", "one")
    assert hidden(tmp_path) == [".x.writing-0123"]


def test_a_writer_whose_folder_is_taken_away_begins_anew(tmp_path, monkeypatch):
    flock, taken = fcntl.flock, []

    def swept_once(descriptor, mode):
        flock(descriptor, mode)
        if not taken:
            taken.extend(tmp_path.glob(".x.writing-*"))
            taken[0].rmdir()

    monkeypatch.setattr(fcntl, "flock", swept_once)
    put(tmp_path / "x", "one")
    assert held(tmp_path / "x") == ("one", "one")


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    put(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink()
    assert held(tmp_path / "real") == ("one", "one")


@pytest.mark.parametrize("place", [".", "..", "here/.."])
def test_the_folder_one_works_in_is_never_replaced(tmp_path, monkeypatch, place):
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(FileError, match="a folder of its own"):
        put(Path(place), "one")
    assert (tmp_path / "work" / "here").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="is a file; name a folder"):
        put(tmp_path / "file", "one")
    with pytest.raises(FileError, match="file is a file"):
        check_writable(tmp_path / "file" / "below" / "x")
    with pytest.raises(FileError, match="is a folder; name a file"):
        write_file(tmp_path, "x")
    assert (tmp_path / "file").read_text() == "x"


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 2, 7))
    check_writable(tmp_path / "new" / "x", 7)
    with pytest.raises(FileError, match=r"needs 8 bytes and the disk has 7 free"):
        check_writable(tmp_path / "new" / "x", 8)
    with pytest.raises(FileError, match="needs 8 bytes"), whole_folder(tmp_path / "x", 8):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission"),
        (errno.EROFS, "read-only"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_refusal_on_the_way_is_explained_and_loses_nothing(
    tmp_path, monkeypatch, code, word, call
):
    put(tmp_path / "x", "old")

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as m:
        m.setattr(os, call, refuse)
        with pytest.raises(FileError, match=word):
            put(tmp_path / "x", "new")
    assert held(tmp_path / "x") == ("old", "old")
    assert hidden(tmp_path) == []


def test_a_second_rename_that_fails_puts_the_old_back(tmp_path, monkeypatch):
    put(tmp_path / "x", "old")
    rename = os.rename

    def fail_into_place(old, new):
        if ".writing-" in str(old) and Path(new).name == "x":
            raise OSError(errno.EIO, "broken")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail_into_place)
    with pytest.raises(FileError, match="the disk reports an error"):
        put(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a").read_text() == "old"


def test_a_folder_of_somebody_else_is_refused_at_once(tmp_path):
    tmp_path.chmod(0o555)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            check_writable(tmp_path / "x")
        except FileError as error:
            os._exit(5 if "permission is denied" in str(error) else 6)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    tmp_path.chmod(0o755)


def test_a_file_is_written_whole(tmp_path, monkeypatch):
    write_file(tmp_path / "sub" / "f", "ä")
    assert (tmp_path / "sub" / "f").read_bytes() == "ä".encode()
    write_file(tmp_path / "sub" / "f", b"\x00\x01")
    assert (tmp_path / "sub" / "f").read_bytes() == b"\x00\x01"

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FileError, match="the disk is full"):
        write_file(tmp_path / "sub" / "f", "new")
    assert (tmp_path / "sub" / "f").read_bytes() == b"\x00\x01"
    assert hidden(tmp_path / "sub") == []


@pytest.mark.parametrize(
    ("path", "error", "part"),
    [
        (None, InputError, "None is no path"),
        (3, InputError, "3 is no path"),
        (b"out", InputError, "b'out' is no path"),
        ("a\0b", InputError, "embedded null byte"),
        ("/proc/finespun", FileError, "takes no files there"),
        ("/proc/self/finespun", FileError, "takes no files there"),
        ("x" * 300, FileError, "the name is too long"),
    ],
)
def test_what_can_be_no_place_is_refused_in_plain_words(path, error, part):
    for write in (lambda: whole_folder(path).__enter__(), lambda: write_file(path, "")):
        with pytest.raises(error, match=part):
            write()
    if error is InputError:
        with pytest.raises(error, match=part):
            settled(path)
