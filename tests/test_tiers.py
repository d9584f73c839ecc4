"""Tiers and times of the tests: what each tier runs, how a sample is drawn, what is beyond."""

import doctest
import json

import pytest
import tiers
import times
from tiers import TIERS, drawn, left_out, sampled

RUN = {
    "tier": "quick", "whole": True, "workers": 2, "wall": 9.0, "collection": 1.0, "load": 0.5,
    "failed": [],
    "tests": {"tests/a/test_x.py::one": [9.0, 8.0], "tests/a/test_x.py::two": [1, 1.5],
              "tests/test_y.py::three[a/b]": [9.0, 0.5]},
}  # fmt: skip
BUDGETS = {"longest": {"quick": 7}, "quick": {"a": 9, "other": 1}, "full": {"a": 1}}


@pytest.mark.parametrize("module", [tiers, times])
def test_examples_hold(module):
    assert doctest.testmod(module).attempted
    assert not doctest.testmod(module).failed


def test_each_tier_is_a_part_of_the_next():
    marks = [[], ["slow"], ["full"], ["slow", "full"]]
    kept = [{str(m) for m in marks if not left_out(m, tier)} for tier in TIERS]
    assert kept[0] < kept[1] < kept[2]
    assert len(kept[2]) == len(marks)


def test_a_larger_share_has_all_of_a_smaller_one():
    names = [f"case-{i}" for i in range(2000)]
    shares = [{n for n in names if drawn(n, share)} for share in (0.0, 0.1, 0.5, 1.0)]
    assert not shares[0]
    assert shares[1] < shares[2] < shares[3] == set(names)
    assert 0.07 < len(shares[1]) / len(names) < 0.13


def test_no_table_is_without_a_quick_case_and_none_is_lost():
    made = sampled(range(50), 0.0, 0.3, name="number {}".format)
    assert [p.id for p in made] == [f"number {i}" for i in range(50)]
    marks = [{m.name for m in p.marks} for p in made]
    assert marks[0] == set()
    assert {"slow"} in marks
    assert {"full"} in marks
    assert set() not in marks[1:]
    assert marks != [{m.name for m in p.marks} for p in sampled(range(50), 0.0, 0.3, salt="x")]


def test_folders_and_tests_beyond_their_budgets_are_named():
    assert times.by_folder(RUN["tests"]) == {"a": (2, 9.5), ".": (1, 0.5)}
    assert times.beyond(RUN, BUDGETS) == [
        "a: 10 s, its budget is 9 s",
        "tests/a/test_x.py::one: 8.0 s, a quick test has at most 7 s",
    ]
    part = {**RUN, "whole": False}
    assert len(times.beyond(part, BUDGETS)) == 1
    assert not times.beyond({**part, "tier": "full"}, BUDGETS)


def test_a_run_is_shown_checked_and_recorded(tmp_path, capsys):
    (tmp_path / "run.json").write_text(
        json.dumps({**RUN, "tests": {"tests/test_y.py::t": [1, 99]}})
    )
    arguments = ["--run", str(tmp_path / "run.json"), "--record", str(tmp_path / "kept.json")]
    assert times.main(arguments) == 0
    assert times.main([*arguments, "--check"]) == 1
    assert "99.0  tests/test_y.py::t" in capsys.readouterr().out
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert (kept["tier"], kept["folders"]) == ("quick", {".": {"tests": 1, "seconds": 99.0}})
    assert len(kept["commit"]) == 40
    assert times.main(["--run", str(tmp_path / "nowhere.json")]) == 2
