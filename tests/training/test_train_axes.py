"""Recipes that choose by what the base does, or change the update while it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Events, write_recipe

import finespun as fs
from finespun import hosts
from finespun.bench import Bench, BenchSpec
from finespun.contract import TensorSite
from finespun.contract.structure import Unmeasured
from finespun.driver import estimate_gradients, mean_activations
from finespun.errors import InputError
from finespun.methods.axes import AXES
from finespun.methods.structures import S2FT
from finespun.recipes.recipe import Recipe
from finespun.training.estimate import estimate
from finespun.training.look import LOOK, first_batches, look, weighed
from finespun.training.output import Result
from finespun.training.run import limits_of, prepare, run

FEEDFORWARD = "targets=['intermediate.dense', 'output.dense']"
BLOCKS = "targets=['encoder.layer.0', 'encoder.layer.1', 'query', 'value']"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.load(write_recipe(tmp_path)).changed(["training.checkpoint_every=2"])


def s2ft(recipe: Recipe, select: str) -> Recipe:
    structure = f"structure={{kind: s2ft, channels: 0.25, heads: 0.5, select: {select}}}"
    return recipe.changed([structure, FEEDFORWARD, "training.lr=1e-2"])


def events(recipe: Recipe, **options: int) -> Recipe:
    allocation = {"kind": "merge_inject", **options}
    return recipe.changed(
        [
            "structure={kind: lor2c, rank: 4}",
            BLOCKS,
            f"allocation={allocation}",
            "training.lr=1e-2",
        ]
    )


class Stops(Events):
    """Breaks the run off after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def tell(self, record: Any) -> None:
        super().tell(record)
        if record["event"] == "step" and record["step"] == self.step:
            raise OSError("broken off")


def resumed(recipe: Recipe, after: int) -> tuple[Result, dict[str, torch.Tensor]]:
    """The run broken off after a step, then taken up: its result and its tensors."""
    recipe = recipe.changed([f"output={recipe.output}-{after}"])
    with pytest.raises(OSError, match="broken off"):
        run(recipe, reporter=Stops(after))
    result = run(recipe, resume=True)
    return result, load_file(Path(recipe.output) / "adapter.safetensors")


# --- what a structure chooses by -----------------------------------------------------------------
@pytest.mark.parametrize("select", ["gradient", "activation", "product"])
def test_units_are_chosen_by_the_first_rows(recipe: Recipe, select: str) -> None:
    """The recipe's plan is that of scores measured by hand on the same rows."""
    recipe = s2ft(recipe, select)
    task = recipe.data.choose()
    data = task.read(recipe.data.source)
    task = task.settled(data.train)
    text = task.load(recipe.model, recipe.training.seed)
    rows = task.encode(text, data.train, limits_of(recipe.training))
    batches = list(first_batches(recipe, task, text, rows))
    assert sum(len(batch["labels"]) for batch in batches) == min(LOOK, len(rows))
    text.model.eval()
    names = hosts.find(text.model, recipe.targets)
    measured = {
        "gradient": lambda: estimate_gradients(text.model, names, batches, weighed(task)),
        "activation": lambda: mean_activations(text.model, names, batches, lambda m, b: m(**b)),
    }
    scores = measured["gradient" if select == "gradient" else "activation"]()
    wanted = recipe.structure.plan(
        list(hosts.sites(text.model, names, recipe.structure).values()), scores
    )
    job = prepare(recipe)
    assert job.adapter.attached.plan == wanted
    drawn = prepare(s2ft(recipe, "random")).adapter.attached.plan
    assert drawn.choices != wanted.choices
    assert drawn.sites == wanted.sites


def test_chosen_units_are_trained_and_kept(recipe: Recipe) -> None:
    recipe = s2ft(recipe, "gradient")
    plan = prepare(recipe).adapter.attached.plan
    result = run(recipe)
    assert result.num_update_parameters == recipe.structure.total_parameters(plan) > 0
    model = prepare(recipe.changed(["targets=[]"])).text.model
    again = fs.load(model, recipe.output, name="again")
    assert again.attached.plan == plan
    assert min(again.norms().values()) > 0


def test_a_run_that_chose_by_the_base_is_resumed_exactly(recipe: Recipe) -> None:
    recipe = s2ft(recipe, "gradient")
    whole = run(recipe)
    kept = load_file(Path(recipe.output) / "adapter.safetensors")
    result, tensors = resumed(recipe, after=3)
    assert result.after == whole.after
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)


def test_another_choice_on_resuming_is_refused(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As other threads may round a score otherwise; nothing is trained at the wrong place."""
    recipe = s2ft(recipe, "gradient")
    with pytest.raises(OSError, match="broken off"):
        run(recipe, reporter=Stops(3))

    def upside_down(*about: Any) -> Any:
        seen = look(*about)
        for scores in seen.found.values():
            scores.update({name: 1 / (1 + score.abs()) for name, score in scores.items()})
        return seen

    monkeypatch.setattr("finespun.training.run.look", upside_down)
    with pytest.raises(InputError, match=r"s2ft chooses other parameters.*training\.threads=1"):
        run(recipe, resume=True)


def test_sizes_are_counted_without_scores(recipe: Recipe) -> None:
    sites = [TensorSite(f"layer.{i}", torch.empty(40, 30, device="meta")) for i in range(3)]
    counts = {
        select: form.total_parameters(form.plan(sites, Unmeasured()))
        for select in ("random", "weight", "activation", "product", "gradient")
        for form in [S2FT(channels=0.1, select=select)]  # type: ignore[arg-type]
    }
    assert set(counts.values()) == {3 * 3 * 40}


# --- what changes while it trains ----------------------------------------------------------------
def test_events_happen_and_what_they_removed_is_gone(recipe: Recipe) -> None:
    """Two bypasses of 2·16·4 parameters merge into one; what sleeps goes; a file holds the rest."""
    merged = run(events(recipe, merges=1, fade=0))
    assert merged.num_update_parameters == 2 * 16 * 4
    recipe = events(recipe.changed([f"output={recipe.output}-2"]), injects=1, fade=2)
    assert estimate(recipe).num_update_parameters == 2 * 2 * 16 * 4, "what sleeps is not counted"
    result = run(recipe, reporter=(heard := Events()))
    assert result.num_update_parameters == 2 * 16 * 4 + 2 * (16 + 16) * 2
    assert "inject of encoder.encoder.layer." in heard.notes()
    assert "after step 4, sfs" in heard.notes()
    model = prepare(recipe.changed(["targets=[]", "allocation=null", "structure={kind: lora}"]))
    again = fs.load(model.text.model, recipe.output, name="again")
    assert again.num_update_parameters == result.num_update_parameters
    assert sorted(again.deltas)[-1].endswith("value")
    assert Recipe.load(Path(recipe.output) / "recipe.yaml").allocation == recipe.allocation


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 3, 5, 9])
def test_a_run_with_events_is_resumed_exactly(recipe: Recipe, after: int) -> None:
    """Broken off before, between and after the events, and while a bypass fades."""
    recipe = events(recipe, injects=1, fade=4)
    whole = run(recipe)
    kept = load_file(Path(recipe.output) / "adapter.safetensors")
    result, tensors = resumed(recipe, after)
    assert (result.after, result.num_update_parameters) == (
        whole.after,
        whole.num_update_parameters,
    )
    assert tensors.keys() == kept.keys()
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ["structure={kind: lora}", "targets=[query]"],
            "allocation: merge_inject needs LoR2C of rank 2 or more, not lora",
        ),
        (["structure.rank=1"], "merge_inject needs LoR2C of rank 2 or more, not rank 1"),
        (
            ["structure={kind: shira, mask: given}"],
            "structure: shira needs a call from Python .* with mask='given'; try mask='random'",
        ),
        (["allocation.merges=2"], r"merges=2, but there are 1 neighbouring"),
        (["allocation.merges=-1"], r"allocation: merges=-1.*must not be negative"),
        (["allocation.merge=1"], r"merge_inject has no option 'merge'; nearest: 'merges'"),
        (
            ["allocation.kind=merge_injec"],
            "no allocation is called 'merge_injec'; nearest: 'merge_inject'",
        ),
        (["allocation.merges=few"], r"allocation.merges = 'few' .*valid integer"),
    ],
)
def test_what_cannot_happen_is_told_before_training(
    recipe: Recipe, changes: list[str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        estimate(events(recipe, merges=1).changed(changes))


def test_members_of_a_bench_have_allocations_of_their_own(recipe: Recipe, tmp_path: Path) -> None:
    values = recipe.model_dump(mode="json", exclude={*AXES, "output", "trackers"})
    del values["training"]["lr"]
    values["training"]["epochs"] = 1
    blocks = BLOCKS.partition("=")[2]
    text = (
        f"recipe: {values}\nmembers:\n"
        f"  - {{structure: {{kind: lor2c, rank: 4}}, targets: {blocks}, lr: 1e-2, name: still}}\n"
        f"  - {{structure: {{kind: lor2c, rank: 4}}, targets: {blocks}, lr: 1e-2, name: merging, "
        "allocation: {kind: merge_inject, merges: 1}}\n"
        "  - {structure: {kind: s2ft, select: gradient, channels: 0.25}, name: chosen, lr: 1e-2, "
        f"targets: [intermediate.dense, output.dense]}}\nseeds: [0]\noutput: {tmp_path / 'bench'}\n"
    ).replace("None", "null")
    text = text.replace("False", "false")
    summary = Bench(BenchSpec.parse(text), "test").run()
    numbers = {row.name: row.num_update_parameters for row in summary.rows}
    assert numbers["merging"] == 2 * 16 * 4
    assert numbers["still"] == 2 * numbers["merging"]
    assert numbers["chosen"] == 2 * (6 * (16 + 16) + 8 * 16)
    with pytest.raises(InputError, match="recipe must not set allocation; a bench has members"):
        BenchSpec.parse(text, ["recipe.allocation={kind: merge_inject}"])
    with pytest.raises(InputError, match=r"num_parameters = \[128\] beside an allocation"):
        BenchSpec.parse(text.replace("name: merging", "name: merging, num_parameters: [128]"))
    with pytest.raises(InputError, match="merges=5, but there are 1"):
        Bench(BenchSpec.parse(text.replace("merges: 1", "merges: 5")), "test").run()
