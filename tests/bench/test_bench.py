"""The sweeper's parts without a model: bench files, budgets, the search, kept trials, tables."""

import csv
import io
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from finespun.bench import BenchSpec, Row, Summary, fit
from finespun.bench.budget import total
from finespun.bench.picture import draw
from finespun.bench.search import MOST_EXTENSIONS, choose_lr
from finespun.bench.spec import describe, read_rates
from finespun.bench.summary import half_interval
from finespun.bench.tables import csv_text, markdown, show
from finespun.bench.trials import FILE, Outcome, Results, Trial
from finespun.contract import TensorSite
from finespun.errors import FileError, InputError
from finespun.methods.axes import make
from finespun.methods.structures import LSR, LoRA
from finespun.recipes.recipe import Recipe

TEXT = """\
recipe:
  model: minilm-l3
  data: {builtin: trec}
  training: {epochs: 2}
members:
  - targets: []
  - structure: {kind: lora, r: 8}
  - structure: {kind: lsr, rank: 4}
    num_parameters: [9000, 4000]
    lrs: [1e-3, 3e-3, 1e-2]
lrs: {low: 1e-3, high: 1e-1, count: 5}
search: {epochs: [1]}
"""


def sites(count: int = 6, n_in: int = 384, n_out: int = 384) -> list[TensorSite]:
    return [TensorSite(f"layer.{i}", torch.empty(n_out, n_in)) for i in range(count)]


# --- bench files ---------------------------------------------------------------------------------
def test_a_bench_file_is_read_whole() -> None:
    spec = BenchSpec.parse(TEXT)
    assert [m.structure for m in spec.members[1:]] == [LoRA(rank=8), LSR(rank=4)]
    assert [m.targets for m in spec.members] == [(), None, None]
    assert spec.members[1].given == {"kind", "rank"}
    assert spec.members[2].num_parameters == (9000, 4000)
    assert spec.members[2].lrs == (1e-3, 3e-3, 1e-2)
    assert spec.lrs == (0.001, 0.00316, 0.01, 0.0316, 0.1)
    assert (spec.seeds, spec.rungs, spec.extend) == ((0, 1, 2), (1, 2), True)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sead=3", "sead is not a key .*nearest: 'seeds'"),
        ("recipe.trainin={}", "recipe.trainin is not a key .*; nearest: 'training'"),
        ("recipe.training.epochs=x", "recipe.training.epochs = 'x' should be a valid integer"),
        ("recipe.training.lr=1", "recipe must not set lr; a bench has lrs"),
        ("recipe.structure={kind: lora}", "recipe must not set structure; a bench has members"),
        ("members=[]", "members: is a list of members"),
        (
            "members=[{structure: {kind: lra}}]",
            "member 1: structure: no structure is called 'lra'; nearest: .*'lora'",
        ),
        ("members=[{targets: [], structure: {kind: lora}}]", "trains the head alone, without"),
        ("members=[{num_parameters: [9]}]", "member 1: structure is missing; targets"),
        ("members=[{structure: {kind: lora, rnk: 3}}]", "lora has no option 'rnk'; .*'rank'"),
        (
            "members=[{structure: {kind: lora}, num_parameter: [3]}]",
            ".*'num_parameters'",
        ),
        (
            "members=[{structure: {kind: lora}, allocation: {kind: merge_inject, merges: 1}}]",
            "member 1: allocation: merge_inject needs LoR2C of rank 2 or more, not lora",
        ),
        (
            "members=[{structure: {kind: lor2c}, num_parameters: [9216], "
            "allocation: {kind: merge_inject, merges: 1}}]",
            r"num_parameters = \[9216\] beside an allocation: .* structure's options instead",
        ),
        (
            "members=[{structure: {kind: shira, mask: given}}]",
            "member 1: structure: shira needs a call from Python .*; try mask='random'",
        ),
        ("members=[{structure: {kind: lora}, num_parameters: [0]}]", "greater than or equal to 1"),
        ("members=[4]", "member 1: 4 needs a structure"),
        ("lrs=[1e-3, 3e-3]", "2 learning rates are too few: .* a neighbour on both sides"),
        ("lrs=[]", "no learning rates; try"),
        ("lrs=[0, 1, 2]", "0 is no learning rate"),
        ("lrs=fast", "'fast' is neither a list of learning rates nor"),
        ("lrs={low: 1e-3, high: 1e-1}", "count is missing"),
        ("search.epochs=[2]", r"search.epochs = \[2\] must rise and stay below the 2 epochs"),
        ("seeds=[1, 1]", r"seeds = \[1, 1\] repeats a seed"),
    ],
)
def test_what_cannot_work_is_refused_by_name(override: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        BenchSpec.parse(TEXT, [override], source="b.yaml")


def test_an_error_names_the_line() -> None:
    with pytest.raises(InputError, match=r"^b\.yaml, line 12: serch is not a key"):
        BenchSpec.parse(TEXT.replace("search", "serch"), source="b.yaml")


def test_a_missing_bench_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(TEXT)
    assert BenchSpec.load(tmp_path / "demo.yaml") == BenchSpec.parse(TEXT)
    with pytest.raises(FileError, match=r"nearest: 'demo\.yaml'"):
        BenchSpec.load(tmp_path / "dmo.yaml")


@pytest.mark.parametrize(
    "name", ["demo", "comparison", "comparison-small", "structures", "structures-l6"]
)
def test_the_examples_are_lawful(name: str) -> None:
    folder = Path(__file__).parent.parent.parent / "examples"
    assert len(BenchSpec.load(folder / f"{name}.yaml").members) >= 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("lr: 1e-3, lrs: [1e-3, 2e-3, 3e-3]", "lr and lrs exclude each other"),
        ("lr: 1e-3, lr_of: other", "lr and lr_of exclude each other"),
        ("lr_power: 0.5", "lr_power needs lr_of"),
        ("lr_of: a, lr_power: 1e6", r"member 1: lr_power = 1000000.0 .* less .* to 4"),
        ("lr_of: a, lr_power: -5", r"member 1: lr_power = -5 .* greater .* to -4"),
        ("lr_of: a, lr_power: .nan", r"member 1: lr_power = nan .* finite"),
    ],
)
def test_a_member_says_in_one_way_where_its_rate_comes_from(more: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BenchSpec.parse(
            "recipe: {model: minilm-l3, data: {builtin: trec}}\n"
            f"members: [{{structure: {{kind: lora}}, {more}}}]\n"
        )


@given(st.floats(1e-6, 1e-2), st.floats(1.5, 1e4), st.integers(3, 12))
def test_a_grid_has_equal_ratios(low: float, span: float, count: int) -> None:
    lrs = read_rates({"low": low, "high": low * span, "count": count})
    assert list(lrs) == sorted(lrs)
    if len(lrs) == count:
        step = span ** (1 / (count - 1))
        for a, b in pairwise(lrs):
            assert b / a == pytest.approx(step, rel=0.011)  # three digits each


@pytest.mark.parametrize(
    ("named", "name"),
    [
        (LoRA(rank=8, seed=3), "LoRA r=8"),
        (LoRA(rank=2, rslora=True), "LoRA r=2 rslora=True"),
        (LSR(rank=4, separation_rank=16), "LSR r=4 s=16"),
    ],
)
def test_names_say_sizes_and_what_is_unusual(named: Any, name: str) -> None:
    assert describe(named) == name


# --- budgets -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("start", "given_options", "budget", "expected", "numbers"),
    [
        (LoRA(), (), 36_864, LoRA(rank=8), 36_864),
        (LoRA(), (), 36_863, LoRA(rank=7), 32_256),
        (LoRA(rslora=True), (), 13_824, LoRA(rank=3, rslora=True), 13_824),
        (LSR(), (), 36_864, LSR(rank=16, separation_rank=19), 36_480),
        (LSR(), ("rank",), 13_824, LSR(rank=4, separation_rank=14), 13_440),
        (LSR(), (), 4_000, LSR(rank=4, separation_rank=4), 3_840),
        (LSR(), ("separation_rank",), 20_000, LSR(rank=4, separation_rank=16), 15_360),
    ],
)
def test_the_closest_size_from_below(
    start: Any, given_options: Any, budget: int, expected: Any, numbers: int
) -> None:
    assert fit(start, given_options, sites(), budget) == expected
    assert total(expected, sites()) == numbers


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(500, 200_000), st.sampled_from([(384, 384), (96, 200), (64, 17)]))
def test_no_lawful_size_lies_closer(budget: int, shape: tuple[int, int]) -> None:
    places = sites(2, *shape)
    for base in (LoRA(), LSR()):
        try:
            found = total(fit(base, (), places, budget), places)
        except InputError:
            continue
        assert budget / 2 <= found <= budget
        ranks = [r for r in range(1, min(64, *shape) + 1) if base == LoRA() or r & (r - 1) == 0]
        every = [LoRA(rank=r) for r in ranks]
        if base == LSR():
            terms = range(1, min(shape) + 1)
            every = [LSR(rank=r, separation_rank=s) for r in ranks for s in terms]
            every = [s for s in every if total(s, places) < total(LoRA(rank=s.rank), places)]
        counts = [total(s, places) for s in every]
        assert found == max(count for count in counts if count <= budget)


def test_a_budget_out_of_reach_names_the_nearest_size() -> None:
    with pytest.raises(InputError, match=r"lora .* in 4,000 parameters .* 4,608 \(rank=1\)"):
        fit(LoRA(), (), sites(), 4_000)
    with pytest.raises(InputError, match=r"uses 18,240 of 40,000 .*separation_rank=19\).*leave"):
        fit(LSR(), ("rank",), sites(), 40_000)
    with pytest.raises(InputError, match=r"no free rank .*; leave it out"):
        fit(LoRA(), ("rank",), sites(), 9_000)
    with pytest.raises(InputError, match=r"ia3 has no free rank .*; give its options instead"):
        fit(make("ia3"), (), sites(), 9_000)
    with pytest.raises(InputError, match="fewer parameters than LoRA of the same rank"):
        fit(LSR(rank=1), ("rank",), sites(1, 2, 2), 9)


def test_where_numbers_do_not_depend_on_the_rank_it_stays() -> None:
    assert fit(make("nola", rank=8, k=100, l=100), (), sites(), 1_300).options()["rank"] == 8


def test_numbers_that_fall_with_the_rank_are_fitted_too() -> None:
    found = fit(make("randlora"), (), sites(), 300_000)
    counts = [total(make("randlora", rank=r), sites()) for r in range(1, 65)]
    assert counts[0] > 2 * counts[3]
    assert total(found, sites()) == max(count for count in counts if count <= 300_000)


# --- the search ----------------------------------------------------------------------------------
class Hill:
    """Scores with one peak; remembers what was asked."""

    def __init__(self, peak: float, diverges_above: float = math.inf) -> None:
        self.peak, self.limit, self.asked = peak, diverges_above, []

    def __call__(self, lr: float, epochs: int) -> tuple[float, float] | None:
        self.asked.append((lr, epochs))
        return None if lr > self.limit else (-abs(math.log(lr / self.peak)), 0.0)


GRID = (1e-3, 3e-3, 1e-2, 3e-2)


def test_halving_trains_only_the_best_for_longer() -> None:
    hill = Hill(3.2e-3)
    found = choose_lr(GRID, (1, 2, 4), 0.5, True, hill)
    assert (found.lr, found.lrs, found.at_edge) == (3e-3, GRID, False)
    assert sorted(hill.asked) == sorted(
        [(lr, 1) for lr in GRID]
        + [(3e-3, 2), (1e-2, 2), (3e-3, 4)]
        + [(1e-3, 4), (1e-2, 4)]  # the neighbours of the best
    )


def test_a_rate_that_only_short_runs_like_is_left_again() -> None:
    peaks = {1: 2e-2, 4: 1.1e-3}
    asked = []

    def measure(lr: float, epochs: int) -> tuple[float, float]:
        asked.append((lr, epochs))
        return -abs(math.log(lr / peaks[epochs])), 0.0

    found = choose_lr(GRID, (1, 4), 0.25, True, measure)
    assert (found.lr, found.at_edge) == (1e-3, False)
    assert [lr for lr, epochs in asked if epochs == 4] == [
        3e-2,
        1e-2,
        9e-2,
        3e-3,
        1e-3,
        3.33e-4,
    ]


def test_a_best_rate_at_the_edge_is_followed_outwards() -> None:
    hill = Hill(0.3)
    found = choose_lr(GRID, (2,), 0.5, True, hill)
    assert found.lrs == (*GRID, 0.09, 0.27, 0.81)
    assert (found.lr, found.at_edge) == (0.27, False)
    assert choose_lr(GRID, (2,), 0.5, True, Hill(3.3e-4)).lrs[0] == 1.11e-4


def test_it_is_told_when_the_edge_stays_the_best() -> None:
    still = choose_lr(GRID, (2,), 0.5, False, Hill(0.3))
    assert (still.lr, still.lrs, still.at_edge) == (3e-2, GRID, True)
    far = choose_lr(GRID, (2,), 0.5, True, Hill(1e9))
    assert far.at_edge
    assert len(far.lrs) == len(GRID) + MOST_EXTENSIONS


def test_rates_that_diverge_bound_the_grid() -> None:
    found = choose_lr(GRID, (1, 2), 0.5, True, Hill(1e-1, diverges_above=2e-2))
    assert (found.lr, found.at_edge) == (1e-2, False)
    none = choose_lr(GRID, (1, 2), 0.5, True, Hill(1.0, diverges_above=0.0))
    assert (none.lr, none.at_edge) == (None, False)


def test_equal_scores_are_told_apart_by_the_loss() -> None:
    losses = dict(zip(GRID, (0.9, 0.5, 0.3, 0.8)))
    assert choose_lr(GRID, (1,), 0.5, True, lambda r, _: (0.7, -losses[r])).lr == 1e-2


# --- trials on disk ------------------------------------------------------------------------------
RECIPE = Recipe.parse("model: minilm-l3\ndata: {builtin: trec}\nstructure: {kind: lora}\n")
GOOD = Outcome("ok", {"accuracy": 0.5, "loss": 1.0}, 10, 5, 99, 1.5, 1.25)


def test_trials_come_back_and_are_told_apart(tmp_path: Path) -> None:
    trial = Trial("LoRA", RECIPE)
    results = Results(tmp_path)
    results.add(trial, GOOD, {"versions": {"torch": "2"}})
    again = Results(tmp_path)
    assert again.get(trial) == GOOD
    assert len(again) == 1
    assert again.get(Trial("another name", RECIPE.changed(["output=elsewhere"]))) == GOOD
    for change in ("training.seed=1", "training.lr=2e-3", "structure.rank=2", "data.seed=1"):
        assert again.get(Trial("LoRA", RECIPE.changed([change]))) is None
    assert again.get(Trial("LoRA", RECIPE, (0.2, 0))) is None


def test_a_default_written_out_is_the_same_trial(tmp_path: Path) -> None:
    Results(tmp_path).add(Trial("LoRA", RECIPE), GOOD, {})
    record = json.loads((tmp_path / FILE).read_text())
    del record["recipe"]["training"]["warmup_share"]  # as if the option had not existed then
    (tmp_path / FILE).write_text(json.dumps(record) + "\n")
    assert Results(tmp_path).get(Trial("LoRA", RECIPE)) == GOOD
    changed = RECIPE.changed(["training.warmup_share=0.5"])
    assert Results(tmp_path).get(Trial("LoRA", changed)) is None


def test_a_table_with_other_contents_is_another_trial(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    recipe = RECIPE.changed([f"data={{file: {table}}}"])
    table.write_text("text,label\na,b\n")
    before = Trial("LoRA", recipe).key
    table.write_text("text,label\na,c\n")
    assert Trial("LoRA", recipe).key != before


def test_a_line_cut_short_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(Trial("LoRA", RECIPE), GOOD, {})
    whole = results.path.read_bytes()
    results.path.write_bytes(whole + whole[:40])
    again = Results(tmp_path)
    assert len(again) == 1
    other = Trial("LoRA", RECIPE.changed(["training.seed=1"]))
    again.add(other, GOOD, {})
    assert len(Results(tmp_path)) == 2


@pytest.mark.parametrize("line", ["not json", "[1]", '{"recipe": {"modl": 1}}', "{}"])
def test_damage_inside_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    results = Results(tmp_path)
    results.add(Trial("LoRA", RECIPE), GOOD, {})
    results.path.write_text(results.path.read_text() + line + "\n")
    with pytest.raises(FileError, match="line 2 is not a trial"):
        Results(tmp_path)


def test_divergence_is_kept_as_such(tmp_path: Path) -> None:
    bad = Outcome("diverged", {}, 10, 5, 99, 1.5, 1.25, "the loss is nan in step 3")
    Results(tmp_path).add(Trial("LoRA", RECIPE), bad, {})
    found = Results(tmp_path).get(Trial("LoRA", RECIPE))
    assert found == bad
    assert found.score("accuracy") is None


# --- the summary ---------------------------------------------------------------------------------
def row(name: str, scores: tuple[float | None, ...], **changes: Any) -> Row:
    values: dict[str, Any] = {
        "name": name,
        "structure": LoRA(),
        "targets": ("query", "value"),
        "budget": 36_864,
        "num_update_parameters": 36_864,
        "num_module_parameters": 2_310,
        "bytes": 156_000,
        "lr": 3e-3,
        "lrs": GRID,
        "at_edge": False,
        "scores": scores,
        "seconds": 12.3,
        "cpu_seconds": 11.0,
    }
    return Row(**{**values, **changes})


def summary(*rows: Row) -> Summary:
    return Summary(rows, "accuracy", (0, 1, 2), 1000, "finespun bench a.yaml")


LORA = row("LoRA r=8", (0.80, 0.82, 0.84))
LSR_ROW = row("LSR r=16", (0.81, 0.835, 0.845), structure=LSR(), num_update_parameters=36_480)
HEAD = row("head only", (0.70, 0.71, 0.70), targets=(), num_update_parameters=0, budget=None)


def test_the_interval_is_students() -> None:
    assert half_interval([0.80, 0.82, 0.84]) == pytest.approx(4.302653 * 0.02 / math.sqrt(3))
    assert half_interval([0.5]) is None
    assert LORA.mean == pytest.approx(0.82)


def test_members_at_one_budget_are_paired_by_seed() -> None:
    (gap,) = summary(HEAD, LORA, LSR_ROW).differences
    assert (gap.budget, gap.first, gap.second) == (36_864, "LSR r=16", "LoRA r=8")
    assert gap.mean == pytest.approx(0.01)
    assert gap.half == pytest.approx(half_interval([0.01, 0.015, 0.005]))


def test_rows_are_paired_by_what_was_trained() -> None:
    """A row that has lost more than half of what it was fitted to is not at that budget."""
    for trained, gaps in ((36_864, 1), (18_432, 1), (18_431, 0), (36_865, 0)):
        other = row("LSR r=16", (0.8, 0.8, 0.8), num_update_parameters=trained)
        assert len(summary(LORA, other).differences) == gaps


def test_a_rate_carried_over_is_refused_by_the_name_of_its_source() -> None:
    source = row("LoRA r=1", (0.8, 0.8, 0.8), lr=3e-2, at_edge=True)
    same = {"at_edge": True, "lr_of": "LoRA r=1"}
    one = row("LoRA r=4", (0.8, 0.8, 0.8), lr=1.5e-2, **same)
    two = row("LoRA r=8", (0.8, 0.8, 0.8), lr=1.06e-2, **same)
    assert summary(source, one, two).refusal == (
        "no ranking: the best learning rate lies at the edge of its grid "
        "(LoRA r=1: 0.03 of 0.001 to 0.03, carried over to LoRA r=4, LoRA r=8); widen lrs"
    )


def test_a_ranking_only_where_no_best_rate_lies_at_an_edge() -> None:
    good = summary(HEAD, LORA, LSR_ROW)
    assert [one.name for one in good.ranking] == ["LSR r=16", "LoRA r=8", "head only"]
    assert good.refusal is None
    edge = row("LSR r=16", (0.8, 0.8, 0.8), lr=3e-2, at_edge=True)
    refused = summary(HEAD, LORA, edge)
    assert refused.ranking == ()
    assert "edge of its grid (LSR r=16: 0.03 of 0.001 to 0.03)" in str(refused.refusal)
    lost = summary(LORA, row("LSR r=16", (0.8, None, 0.8)))
    assert lost.refusal == "no ranking: runs diverged (LSR r=16)"
    assert "| rank |" in markdown(good)
    assert "| rank |" not in markdown(refused)
    assert "No ranking: the best learning rate lies at the edge" in markdown(refused)


def test_every_form_names_the_command_and_the_values(tmp_path: Path) -> None:
    found = summary(HEAD, LORA, row("LSR r=16", (0.8, None, 0.8)))
    text = markdown(found)
    assert "| LoRA r=8 | 36,864 | 156,000 | 0.003 | 0.8200 ± 0.0497 | 12.3 | 11.0 |" in text
    assert "| diverged |" in text
    assert text.endswith("Made by: `finespun bench a.yaml`\n")
    table = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [line["member"] for line in table] == ["head only", "LoRA r=8", "LSR r=16"]
    assert float(table[1]["mean"]) == LORA.mean
    assert [table[2][f"accuracy_seed_{i}"] for i in range(3)] == ["0.8", "", "0.8"]
    assert {line["command"] for line in table} == {"finespun bench a.yaml"}
    console = Console(record=True, width=80, file=io.StringIO())
    show(found, console)
    printed = console.export_text()
    assert "LoRA r=8      36,864 156,000 0.003 0.8200 ± 0.0497" in printed
    assert "without the head's 2,310" in printed
    assert "Made by: finespun bench a.yaml" in printed
    assert json.loads(json.dumps(found.as_json()))["refusal"] == found.refusal


def test_the_picture_is_the_same_every_time(tmp_path: Path) -> None:
    found = summary(HEAD, LORA, LSR_ROW)
    svg, png = draw(found, tmp_path / "a")
    again, _ = draw(found, tmp_path / "b")
    assert svg.read_bytes() == again.read_bytes()
    assert b"finespun bench a.yaml" in svg.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"finespun bench a.yaml" in png.read_bytes()
