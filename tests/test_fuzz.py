"""A sample of the fuzzer, and that it would notice what it looks for. All: `make fuzz`."""

import contextlib
import random
import time
from pathlib import Path

import pytest
from fuzz import Outcome, Templates, run_case, run_many
from fuzz_damage import Canary, damage
from fuzz_formats import FORMATS, Format, write_native

from finespun.errors import FileError, InputError

SAMPLE = 150


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return Templates(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
def test_valid_folders_are_read(templates):
    for one in FORMATS:
        for seed in range(3):
            with contextlib.suppress(InputError):  # what its method cannot be converted to
                one.use(templates.folders[one.name], random.Random(seed))


def test_a_sample_is_read_or_refused_by_name(templates):
    found = list(run_many([f"quick/{i}" for i in range(SAMPLE)], templates))
    assert not [str(o) for o in found if o.end == "FAILED"]
    assert len(found) == SAMPLE
    ends = [o.end for o in found]
    assert ends.count("read") > SAMPLE / 20
    assert ends.count("FileError") > SAMPLE / 2


def test_a_case_is_the_same_every_time(templates):
    for number in range(20):
        first, second = (run_case(f"again/{number}", templates) for _ in range(2))
        assert (first.format, first.damage, first.end) == (second.format, second.damage, second.end)


@pytest.mark.slow
def test_every_way_changes_something_and_stays_in_the_folder(tmp_path):
    ways = set()
    for seed in range(150):
        folder = tmp_path / str(seed) / "folder"
        folder.mkdir(parents=True)
        write_native(folder, "lora")
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        told = damage(folder, random.Random(seed))
        assert "too damaged" not in told
        small = [p for p in folder.iterdir() if p.is_file() and not p.is_symlink()]
        after = {p.name: p.read_bytes() for p in small if p.stat().st_size < 1 << 20}
        ways.add(told.partition(": ")[2][:5])
        if "nothing" not in told.partition(": ")[2]:
            assert after != before or "swapped" in told or "0 others" in told, told
    assert len(ways) > 15


def uses(use) -> Format:
    return Format("of the test", lambda folder: write_native(folder, "lora"), use)


def crash(folder: Path, draw: random.Random) -> None:
    raise ValueError("somebody's own error")


def vague(folder: Path, draw: random.Random) -> None:
    raise FileError("something is wrong")


def named(folder: Path, draw: random.Random) -> None:
    raise FileError(f"{folder / 'adapter.json'} is damaged")


def greedy(folder: Path, draw: random.Random) -> None:
    bytearray(400 << 20)


def slow(folder: Path, draw: random.Random) -> None:
    time.sleep(60)


def dead(folder: Path, draw: random.Random) -> None:
    import os

    os._exit(3)


def opened(folder: Path, draw: random.Random) -> None:
    import pickle

    pickle.loads(pickle.dumps(Canary(folder)))


FAULTS = {
    crash: "ValueError: somebody's own error",
    vague: "names neither file nor key",
    greedy: "took 4",
    slow: "over 1 seconds",
    dead: "the process died (3)",
    opened: "a pickle was opened",
}


@pytest.mark.parametrize("use", FAULTS, ids=lambda use: use.__name__)
def test_faults_are_noticed_and_the_next_case_runs(tmp_path, use):
    templates = Templates(tmp_path, (uses(use),))
    found = list(run_many(["a", "b"], templates, seconds=1 if use is slow else 30))
    assert found[0].end == "FAILED"
    assert FAULTS[use] in found[0].detail
    assert [o.case for o in found] == ["a", "b"]


def test_a_named_refusal_is_lawful(tmp_path):
    outcome = run_case("a", Templates(tmp_path, (uses(named),)))
    assert isinstance(outcome, Outcome)
    assert outcome.end == "FileError"
