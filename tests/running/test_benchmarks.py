"""The benchmarks' arithmetic, gates and page; no times are asserted."""

import dataclasses
import re

import pytest
import torch

from benchmarks import __main__ as pages
from benchmarks import forming, measure, merging, models, training_step
from benchmarks.measure import Line, Timed, calmest, gates, table


def test_ratios_are_medians_of_the_ratios_of_rounds():
    seconds = {"ours": [1.0, 2.0, 4.0, 1.0, 1.0], "PEFT": [3.0, 4.0, 40.0, 2.0, 1.0]}
    found = Timed(seconds, [1.0, 1.0, 1.0, 1.0, 1.0])
    line = Line.of("merge in place", found)
    assert line.ratio == 2.0
    assert (line.low, line.high) == (1.5, 6.5)
    assert (line.ours, line.theirs) == (1e3, 3e3)
    assert line.spread == 0.0
    assert table([line]).endswith("| 2.00 | 1.50 to 6.50 | 3.0 | **no** |")
    with_spread = Timed(seconds, [1.0, 1.0, 2.0, 3.0, 3.0])
    assert with_spread.spread == 1.0


def test_every_contestant_runs_once_a_round_and_is_undone():
    calls = []
    work = {n: (lambda n=n: calls.append(n)) for n in ("ours", "PEFT")}
    undo = {n: (lambda n=n: calls.append(f"undo {n}")) for n in work}
    found = measure.timed(work, undo, rounds=3)
    assert [len(s) for s in found.seconds.values()] == [3, 3]
    assert len(found.product) == 3
    assert sorted(calls) == sorted(["ours", "PEFT", "undo ours", "undo PEFT"] * 4)
    for i in range(0, len(calls), 2):
        assert calls[i + 1] == f"undo {calls[i]}"
    assert {calls[0], calls[4]} == {"ours", "PEFT"}


def test_on_another_device_the_clock_waits_for_it(monkeypatch):
    """The device is not asked for anything here: only the order of events is looked at."""
    events = []
    monkeypatch.setattr(measure, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append("waited"))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: events.append("read") or 0.0)
    measure._seconds(lambda: events.append("work"), 2)
    assert events == ["waited", "read", "work", "work", "waited", "read"]


def test_pairs_are_equal_and_a_difference_stops_everything():
    ours, theirs = models.pair(64, 1, 4, ("one", "two"))
    ids = models.tokens(1, 5)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        models.same(models.hidden(ours, ids), models.hidden(theirs, ids), "hidden states")
        ours.layers[0].mlp.up_proj.weight.mul_(1.01)
        with pytest.raises(RuntimeError, match="hidden states differ by"):
            models.same(models.hidden(ours, ids), models.hidden(theirs, ids), "hidden states")
    one = models.pair(64, 1, 4)
    training_step.check(*one, ids)


@pytest.fixture
def short(monkeypatch):
    """Tiny shapes and few rounds."""
    monkeypatch.setattr(measure.timed, "__defaults__", (None, 3, 0.0, measure.nothing))
    monkeypatch.setattr(training_step, "SHAPES", ((64, 1, 4, 2),))
    monkeypatch.setattr(merging, "WIDTH", 64)
    monkeypatch.setattr(merging, "LAYERS", 1)
    monkeypatch.setattr(forming, "WIDTH", 32)
    monkeypatch.setattr(forming, "SITES", 2)


def test_parts_run_and_leave_their_models_as_they_were(short):
    lines = [*training_step.measure(), *merging.measure(), *forming.measure()]
    assert [line.name for line in lines] == [
        "step, width 64, no dropout",
        "LSR step, width 64",
        "step, width 64, dropout 0.05",
        "merge in place",
        "merge in place, the floor",
        "merge in place, again",
        "merge, undo kept",
        "merge, undo kept, again",
        "form all factors of LSR",
        "the same with its backward pass",
    ]
    assert all(line.ours > 0 and line.theirs > 0 for line in lines)
    text = pages.page({"merging": lines[3:8]}, "0.1", "0.2")
    assert text.count("| merge") == 5
    assert "7 layers of width 64" in text


def test_a_part_is_measured_until_it_is_calm():
    found = Timed({"ours": [1.0] * 4, "PEFT": [2.0] * 4}, [1.0] * 4)
    spreads = iter([0.5, 0.3, 0.4, 0.1])
    parts = []

    def part():
        parts.append([dataclasses.replace(Line.of("x", found), spread=next(spreads))])
        return parts[-1]

    assert calmest(part) is parts[1]
    assert len(parts) == 3
    assert calmest(part) is parts[3]
    assert len(parts) == 4


def test_the_page_has_a_line_for_every_gate():
    text = pages.PAGE.read_text(encoding="utf-8")
    for name, least in gates().items():
        (ratio,) = re.findall(
            rf"^\| {re.escape(name)} \|.*\| ([\d.]+) \| .* \| {least} \|", text, re.M
        )
        assert float(ratio) > 0
