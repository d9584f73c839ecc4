"""The benchmarks' arithmetic, gates and page; no times are asserted."""

import dataclasses
import re

import pytest
import torch
import yaml
from tiny_run import write_recipe

from benchmarks import measure
from benchmarks.measure import Foretold, Line, Timed, calmest, gates, table
from finespun.recipes.recipe import Recipe

pytestmark = pytest.mark.slow


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
    from benchmarks import models, training_step

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
    from benchmarks import forming, merging, switching, training_step

    monkeypatch.setattr(measure.timed, "__defaults__", (None, 3, 0.0, measure.nothing))
    monkeypatch.setattr(training_step, "SHAPES", ((64, 1, 4, 2),))
    monkeypatch.setattr(merging, "WIDTH", 64)
    monkeypatch.setattr(merging, "LAYERS", 1)
    monkeypatch.setattr(forming, "WIDTH", 32)
    monkeypatch.setattr(forming, "SITES", 2)
    monkeypatch.setattr(switching, "WIDTH", 64)
    monkeypatch.setattr(switching, "CACHE", 64)


def test_parts_run_and_leave_their_models_as_they_were(short):
    from benchmarks import __main__ as pages
    from benchmarks import forming, merging, training_step

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
    text = pages.section("merging", lines[3:8], "0.1", "0.2")
    assert text.count("| merge") == 5
    assert "7 layers of width 64" in text


def test_an_estimate_may_be_off_by_a_factor_up_or_down():
    within = gates(Foretold.gates)
    name = next(iter(within))
    factor = within[name]

    def met(*estimated):
        text = table([Foretold(name, estimated, [2.0] * len(estimated), 0.1)])
        assert f"| {factor} |" in text
        return text.endswith("| yes |")

    assert met(2.0 * factor * 0.99, 2.0, 2.0 / factor * 1.01)
    assert not met(2.0 * factor * 1.01, 2.0, 2.0)
    assert not met(2.0, 2.0, 2.0 / factor * 0.99)
    text = table([Foretold("another", [3.0, 4.0, 4.0], [2.0, 2.0, 4.0], 0.1)])
    assert text.endswith("| another | 4 | 2 | 1.50 | 1.00 to 2.00 |  |  |")


def test_switching_is_checked_before_it_is_timed(short):
    from benchmarks import switching

    lines = switching.measure()
    named = {line.name for line in lines}
    assert {name for name in gates() if "SHiRA" in name} <= named
    assert all(line.ours > 0 and line.theirs > 0 for line in lines)
    layer = switching.Switched.of(torch.bfloat16)
    on, off = switching.library(layer)
    with pytest.raises(RuntimeError, match="weights switched on differ by"):
        layer.check(lambda: None, off)
    with pytest.raises(RuntimeError, match="weights switched off differ by"):
        layer.check(on, lambda: None)


def test_recipes_are_estimated_and_carried_out(tmp_path, monkeypatch):
    from benchmarks import __main__ as pages
    from benchmarks import dry_run

    file = write_recipe(tmp_path, epochs=1)
    tiny = yaml.safe_load(file.read_text())
    monkeypatch.setattr(dry_run, "RECIPES", {"tiny": tiny})
    lines = dry_run.measure()
    assert [line.name for line in lines] == ["steps, tiny", "measuring, tiny"]
    assert all(len(line.ratios) == dry_run.TIMES for line in lines)
    assert all(s > 0 for line in lines for s in (*line.estimated, *line.real))
    assert not (tmp_path / "out").exists()
    text = pages.section("dry_run", lines, "0.1", "0.2")
    assert text.startswith("## What a dry run predicts\n\n| what | estimated, s |")


def test_a_part_measured_again_leaves_the_rest_of_the_page():
    from benchmarks import __main__ as pages

    line = Line.of("x", Timed({"ours": [1.0] * 4, "PEFT": [2.0] * 4}, [1.0] * 4))
    parts = {name: pages.section(name, [line], "0.1", "0.2") for name in ("paths", "merging")}
    assert pages.sections("\n".join((pages.head(), *parts.values()))) == parts


def test_gates_of_dry_runs_are_those_of_its_recipes():
    from benchmarks import dry_run

    named = {f"{what}, {name}" for name in dry_run.RECIPES for what in ("steps", "measuring")}
    assert gates(Foretold.gates).keys() == named
    for values in dry_run.RECIPES.values():
        assert Recipe.model_validate(values).training.epochs == 1


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
    from benchmarks import __main__ as pages

    text = pages.PAGE.read_text(encoding="utf-8")
    for name, least in {**gates(), **gates(Foretold.gates)}.items():
        (ratio,) = re.findall(
            rf"^\| {re.escape(name)} \|.*\| ([\d.]+) \| .* \| {least} \|", text, re.M
        )
        assert float(ratio) > 0
