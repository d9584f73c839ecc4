"""One process at a time works in a folder, and whoever comes second is told who was first."""

import json
import multiprocessing
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from finespun.errors import FileError
from finespun.storage.atomic import whole_folder
from finespun.storage.lock import lock_file, locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no folder is locked there")


def test_the_second_is_told_who_was_first_and_the_third_gets_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "out"
    with locked(folder, "a run"):
        owner = json.loads(lock_file(folder).read_text())
        assert owner["process"] == os.getpid()
        with (
            pytest.raises(FileError, match=f"in use by a run of process {os.getpid()} on "),
            locked(folder, "another"),
        ):
            raise AssertionError
        with locked(tmp_path / "a" / "other", "another"):
            assert lock_file(tmp_path / "a" / "other").exists()
    with locked(folder, "a run"):
        assert lock_file(folder).exists()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_outlives_the_folder_and_ends_with_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    ready = multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with locked(folder, "a run"):
            for _ in range(2):
                with whole_folder(folder) as work:
                    (work / "file").write_text("x")
            ready.set()
            signal.pause()

    child = multiprocessing.get_context("fork").Process(target=hold)
    child.start()
    assert ready.wait(30)
    with pytest.raises(FileError, match=f"process {child.pid} "), locked(folder, "another"):
        raise AssertionError
    child.kill()
    child.join()
    with locked(folder, "another"):
        assert json.loads(lock_file(folder).read_text())["purpose"] == "another"


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[" * 4000, b"[]", b'{"process": 1}'])
def test_a_lock_that_names_nobody_holds_all_the_same(text: bytes, tmp_path: Path) -> None:
    with locked(tmp_path / "out", "a run"):
        lock_file(tmp_path / "out").write_bytes(text)
        again = locked(tmp_path / "out", "another")
        with pytest.raises(FileError, match="in use by another process"), again:
            raise AssertionError


def test_what_the_owner_is_called_reaches_no_terminal(tmp_path: Path) -> None:
    with locked(tmp_path / "out", "\x1b]0;title\x07"):
        again = locked(tmp_path / "out", "another")
        with pytest.raises(FileError) as caught, again:
            raise AssertionError
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_lock_is_never_taken_through_what_is_no_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    path = lock_file(tmp_path / "out")
    os.mkfifo(path) if kind == "fifo" else path.symlink_to(tmp_path / "mine")
    with pytest.raises(FileError, match="cannot be made"), locked(tmp_path / "out", "a run"):
        raise AssertionError
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2775, 0o777])
def test_a_replaced_folder_keeps_modes_and_owners(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "kept" / "deep").mkdir(parents=True)
    (folder / "kept" / "deep" / "file").write_text("mine")
    for place in (folder, folder / "kept", folder / "kept" / "deep"):
        if os.geteuid() == 0:
            os.chown(place, 1234, 2345)
        place.chmod(mode)
    before = [(p.stat().st_uid, p.stat().st_gid) for p in (folder, folder / "kept" / "deep")]
    with whole_folder(folder) as work:
        (work / "new").write_text("new")
    after = folder, folder / "kept" / "deep"
    assert [(p.stat().st_uid, p.stat().st_gid) for p in after] == before
    assert [stat.S_IMODE(p.stat().st_mode) for p in after] == [mode, mode]
    assert (folder / "kept" / "deep" / "file").read_text() == "mine"
