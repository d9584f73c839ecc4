"""The sweeper on a tiny BERT: exact reuse of the model, resuming, divergence, the command."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from finespun.adapters.keys import spelt
from finespun.bench import Bench, BenchSpec
from finespun.bench import workbench as workbench_module
from finespun.bench.run import Contender
from finespun.bench.search import Choice
from finespun.bench.trials import Trial
from finespun.bench.workbench import Workbench
from finespun.cli.app import run
from finespun.errors import InputError
from finespun.methods.structures import LSR, LoRA
from finespun.recipes.recipe import Recipe
from finespun.training.run import run as run_recipe

COLOURS, ANIMALS = ("red", "green", "blue"), ("cat", "dog", "bird")
DEEDS = ("runs", "sleeps", "sings")
PUBLISHED = {
    "comparison-trec-small": "finespun bench examples/comparison.yaml",
    "structures-trec-small": "finespun bench examples/structures.yaml",
    "structures-neighbours": "finespun bench examples/structures-neighbours.yaml",
    "comparison-nyt": "finespun bench examples/comparison-nyt.yaml",
    "structures-trec": "finespun bench examples/structures-l6.yaml",
}
WORDS = ("[PAD]", "[UNK]", "the", "a", *COLOURS, *ANIMALS, *DEEDS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of width 16 and a table of 60 rows in three classes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder / "model")
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(60):
            colour, animal, deed = COLOURS[i % 3], ANIMALS[i // 3 % 3], DEEDS[i // 9 % 3]
            writer.writerow([f"the {colour} {animal} {deed} {'a ' * (i % 5)}", animal])
    return folder


def recipe(place: Path, *changes: str) -> Recipe:
    return Recipe.parse(
        f"model: {place / 'model'}\ndata: {{file: {place / 'rows.csv'}}}\n"
        "targets: [query, value]\nstructure: {kind: lora, rank: 2}\n"
        "training: {epochs: 2, batch_size: 8, lr: 1e-2, threads: 1}\n",
        changes,
    )


def bench_text(place: Path, output: Path) -> str:
    return (
        f"recipe:\n  model: {place / 'model'}\n  data: {{file: {place / 'rows.csv'}}}\n"
        "  targets: [query, value]\n  training: {epochs: 2, batch_size: 8, threads: 1}\n"
        "members:\n"
        "  - targets: []\n"
        "  - structure: {kind: lora}\n    num_parameters: [256]\n"
        "  - structure: {kind: lsr}\n    num_parameters: [256]\n"
        "lrs: [1e-3, 1e-2, 1e-1]\nseeds: [0, 1]\nsearch: {epochs: [1]}\n"
        f"output: {output}\n"
    )


def spec(place: Path, output: Path, *changes: str) -> BenchSpec:
    return BenchSpec.parse(bench_text(place, output), changes)


ALONE = """
import sys
from finespun.recipes.recipe import Recipe
from finespun.training.run import run
result = run(Recipe.load(sys.argv[1]))
print(result.after["accuracy"].hex())
"""


@pytest.mark.slow
def test_a_reused_model_gives_what_a_process_of_its_own_gives(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: all tensors of the adapter, head included, and the metric."""
    wanted = recipe(place, "structure={kind: lsr, separation_rank: 2}", f"output={tmp_path}/out")
    (tmp_path / "recipe.yaml").write_text(wanted.dump())
    command = [sys.executable, "-c", ALONE, str(tmp_path / "recipe.yaml")]
    alone = subprocess.run(command, capture_output=True, text=True, check=True)
    trained: dict[str, torch.Tensor] = {}
    real = workbench_module.file_size

    def note(adapter: Any) -> int:
        trained.clear()
        trained.update({k: v.clone() for k, v in spelt(adapter.attached.tensors()).items()})
        return real(adapter)

    monkeypatch.setattr(workbench_module, "file_size", note)
    bench = Workbench()
    for earlier in (
        recipe(place),
        recipe(place, "training.lr=1e30", "training.max_grad_norm=0"),
        recipe(place, "training.seed=1", "structure.rank=3"),
        recipe(place, "targets=all-linear"),
        recipe(place, "targets=[]"),
    ):
        bench.run(Trial("earlier", earlier))
        bench.run(Trial("earlier", earlier, (0.3, 1)))
    model = bench.model(wanted).model
    outcome = bench.run(Trial("wanted", wanted))
    assert bench.model(wanted).model is model
    assert outcome.metrics["accuracy"].hex() == alone.stdout.strip()
    saved = load_file(tmp_path / "out" / "adapter.safetensors")
    assert saved.keys() == trained.keys()
    for key, tensor in saved.items():
        assert torch.equal(tensor, trained[key]), key


@pytest.mark.slow
def test_the_base_is_untouched_between_trials(place: Path) -> None:
    bench = Workbench()
    one = recipe(place)
    before = {k: v.clone() for k, v in bench.model(one).model.state_dict().items()}
    modes = [module.training for module in bench.model(one).model.modules()]
    bench.run(Trial("a", one))
    after = bench.model(one).model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [module.training for module in bench.model(one).model.modules()] == modes
    assert all(p.requires_grad for p in bench.model(one).model.parameters())


def test_counts_are_the_structures_own(place: Path) -> None:
    bench = Workbench()
    head = 16 * 3 + 3
    for structure, targets in (
        (LoRA(), ()),
        (LoRA(rank=2), ("value",)),
        (LSR(), ("query", "value")),
    ):
        one = recipe(place).model_copy(update={"structure": structure, "targets": targets})
        outcome = bench.run(Trial("a", one))
        expected = structure.total_parameters(structure.plan(bench.sites(one, structure)))
        assert (outcome.num_update_parameters, outcome.num_module_parameters) == (expected, head)
        assert 4 * (expected + head) < outcome.bytes < 4 * (expected + head) + 8_000
    assert expected == 4 * 16 * 32  # sites, terms, and 2·4 parameters in each of four factors


def test_a_trial_that_diverges_is_recorded_and_the_next_one_runs(place: Path) -> None:
    bench = Workbench()
    wild = recipe(place, "training.lr=1e30", "training.max_grad_norm=0")
    outcome = bench.run(Trial("wild", wild))
    assert (outcome.status, dict(outcome.metrics)) == ("diverged", {})
    assert "training.lr" in outcome.error
    assert bench.run(Trial("tame", recipe(place))).status == "ok"


def test_rows_held_out_for_the_result_are_not_in_the_search(place: Path) -> None:
    bench = Workbench()
    one = recipe(place)
    text = bench.model(one)
    train, test = bench.encoded(Trial("a", one), text)
    fewer, held = bench.encoded(Trial("a", one, (0.25, 0)), text)
    assert (len(train), len(test), len(fewer), len(held)) == (48, 12, 36, 12)
    whole = sorted(map(str, train.rows))
    assert sorted([*map(str, fewer.rows), *map(str, held.rows)]) == whole


def test_a_bench_ends_with_tables_and_takes_up_what_it_has(place: Path, tmp_path: Path) -> None:
    told: list[str] = []
    bench = Bench(spec(place, tmp_path / "out"), "finespun bench tiny.yaml", told.append)
    summary = bench.run()
    assert [row.name for row in summary.rows] == ["head only", "LoRA r=2", "LSR r=4 s=2"]
    assert [row.num_update_parameters for row in summary.rows] == [0, 256, 256]
    assert all(len(row.scores) == 2 for row in summary.rows)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"results.jsonl", "table.md", "table.csv", "picture.svg", "picture.png"}
    trials = (tmp_path / "out" / "results.jsonl").read_text()
    assert len(trials.splitlines()) == len(told)
    table = (tmp_path / "out" / "table.md").read_text()
    again: list[str] = []
    repeated = Bench(spec(place, tmp_path / "out"), "finespun bench tiny.yaml", again.append)
    assert repeated.run() == summary
    assert all("known already" in line for line in again)
    assert (tmp_path / "out" / "results.jsonl").read_text() == trials
    assert (tmp_path / "out" / "table.md").read_text() == table


@pytest.mark.slow
def test_an_interrupted_bench_runs_only_what_is_missing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    real = Workbench.run

    def limited(self: Workbench, trial: Trial) -> Any:
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(trial.key)
        return real(self, trial)

    monkeypatch.setattr(Workbench, "run", limited)
    with pytest.raises(KeyboardInterrupt):
        Bench(spec(place, tmp_path / "out"), "c").measure()
    first, ran[:] = list(ran), ran[4:]
    monkeypatch.setattr(Workbench, "run", lambda self, t: ran.append(t.key) or real(self, t))
    Bench(spec(place, tmp_path / "out"), "c").measure()
    assert not set(first) & set(ran)
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()]
    assert [record["key"] for record in records] == [*first, *ran]


def test_seeds_reach_head_structure_and_order(place: Path) -> None:
    one = Contender("LoRA", recipe(place), (1e-3, 1e-2, 1e-1), None)
    trial = one.trial(1e-2, 7, 1)
    assert (trial.recipe.training.seed, trial.recipe.structure.seed) == (7, 7)
    assert (trial.recipe.lr, trial.recipe.training.epochs, trial.held) == (1e-2, 1, None)
    assert one.trial(1e-2, 7, 1, 0.2).held == (0.2, 7)


def test_a_rate_is_carried_to_another_size_by_its_power(place: Path, tmp_path: Path) -> None:
    members = (
        "[{name: a, structure: {kind: lora, rank: 1}, lrs: [1e-3, 2e-3, 4e-3]},"
        " {name: b, structure: {kind: lora, rank: 4}, lr_of: a, lr_power: 0.5},"
        " {name: c, structure: {kind: lora, rank: 4}, lr_of: a},"
        " {name: d, structure: {kind: lora, rank: 4}, lr: 7e-3},"
        " {name: e, structure: {kind: lora, rank: 4}, lr_of: d}]"
    )
    bench = Bench(spec(place, tmp_path / "out", f"members={members}"), "c")
    contenders = bench.contenders()
    asked: list[str] = []

    def search(one: Any) -> Choice:
        asked.append(one.name)
        return Choice(one.lr or 2e-3, one.lrs, False)

    bench.search = search  # type: ignore[method-assign]
    lrs = {name: choice.lr for name, choice in bench.choices(contenders).items()}
    assert lrs == {"a": 2e-3, "d": 7e-3, "b": 1e-3, "c": 2e-3, "e": 7e-3}
    assert asked == ["a", "d"]
    wrong = members.replace("lr_of: a}", "lr_of: aa}")
    with pytest.raises(InputError, match=r"'c' .* of 'aa', .* an lr or a search .*: 'a'"):
        Bench(spec(place, tmp_path / "out", f"members={wrong}"), "c").contenders()


LOR2C = (
    "structure: {kind: lor2c, rank: 4}, targets: [encoder.layer.0, encoder.layer.1, query, value]"
)
CARRIED = [
    ("{targets: []}", "{name: b, structure: {kind: lora}, lr_of: head only%s}", "'head only'"),
    ("{name: a, structure: {kind: lora}}", "{targets: [], name: b, lr_of: a%s}", "'b'"),
    (
        "{name: a, structure: {kind: lora}}",
        f"{{name: b, {LOR2C}, allocation: {{kind: merge_inject, merges: 1}}, lr_of: a%s}}",
        "'b'",
    ),
    (
        f"{{name: a, {LOR2C}, allocation: {{kind: merge_inject, merges: 1}}}}",
        "{name: b, structure: {kind: lora}, lr_of: a%s}",
        "'a'",
    ),
]


@pytest.mark.parametrize(("source", "follower", "named"), CARRIED)
def test_a_power_needs_numbers_known_before_training(
    place: Path, tmp_path: Path, source: str, follower: str, named: str
) -> None:
    """Refused before the search; without a power the rate is the source's own."""
    power = f"members=[{source}, {follower % ', lr_power: 0.5'}]"
    why = "trains no parameters but the head's" if "[]" in power else "has an allocation"
    with pytest.raises(InputError, match=f"lr_power = 0.5 of 'b' .* but {named} {why}"):
        Bench(spec(place, tmp_path / "out", power), "c").run()
    assert not (tmp_path / "out" / "results.jsonl").exists()
    bench = Bench(spec(place, tmp_path / "out", f"members=[{source}, {follower % ''}]"), "c")
    bench.search = lambda one: Choice(2e-3, one.lrs, False)  # type: ignore[method-assign]
    assert bench.choices(bench.contenders())["b"].lr == 2e-3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("members=[{structure: {kind: lora}, num_parameters: [100]}]", "cannot be written in 100"),
        ("members=[{structure: {kind: lora}}, {structure: {kind: lora}}]", "two members are"),
        ("members=[{structure: {kind: c3a, block_size: 7}}]", "block_size=7 does not divide"),
        ("members=[{structure: {kind: lora}, targets: [vlue]}]", "nearest: 'value'"),
        ("metric=acuracy", "metric 'acuracy' is none for the task 'classify'; nearest: 'accuracy'"),
    ],
)
def test_what_the_model_cannot_hold_is_refused_before_any_trial(
    place: Path, tmp_path: Path, change: str, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        Bench(spec(place, tmp_path / "out", change), "c").run()
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_the_command_prints_the_table_and_refuses_a_ranking_by_its_exit_code(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates so small that the highest is always the best: it lies at the edge."""
    (tmp_path / "b.yaml").write_text(bench_text(place, tmp_path / "out"))
    few = ["members=[{targets: []}]", "lrs=[1e-6, 2e-6, 4e-6]", "extend=false"]
    assert run(["bench", str(tmp_path / "b.yaml"), *few, "--json"]) == 5
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["refusal"].startswith("no ranking: the best learning rate lies at the edge")
    assert found["ranking"] == []
    assert found["command"].startswith(f"finespun bench {tmp_path}/b.yaml 'members=[")
    assert printed.err.count("search") == 5  # three rates for one epoch, the best two for both
    assert run(["bench", str(tmp_path / "b.yaml"), *few, "-q"]) == 5
    printed = capsys.readouterr()
    assert "head only" in printed.out
    assert printed.err == ""
    assert run(["bench", str(tmp_path / "b.yaml"), "seads=[1]"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "command"), PUBLISHED.items())
def test_the_published_comparisons_follow_from_their_trials(
    folder: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every trial that the example asks for was run, and gives the table that docs show."""
    root = Path(__file__).parent.parent.parent
    published = root / "docs" / "results" / folder
    shutil.copy(published / "results.jsonl", tmp_path)
    monkeypatch.delattr(Workbench, "run")
    _, _, file, *changes = command.split()
    found = BenchSpec.load(root / file, [*changes, f"output={tmp_path}"])
    Bench(found, command).run()
    assert (tmp_path / "table.csv").read_text() == (published / "table.csv").read_text()
    assert (tmp_path / "table.md").read_text() == (published / "table.md").read_text()


def test_what_sleeps_counts_in_no_budget(place: Path, tmp_path: Path) -> None:
    """LoR2C with layers inside its blocks as targets: they never wake without an allocation."""
    change = (
        "members=[{structure: {kind: lor2c}, num_parameters: [600], "
        "targets: [encoder.layer.0, encoder.layer.1, query, value], lr: 1e-2}]"
    )
    [row] = Bench(spec(place, tmp_path, change, "seeds=[0]"), "test").measure().rows
    assert row.num_update_parameters == 2 * (2 * 16) * 9
    assert row.paired_at == 600


# --- other tasks ---------------------------------------------------------------------------------
def test_a_bench_of_prompts_trains_language_models(tmp_path: Path) -> None:
    """What it finds is what a run of the very recipe finds."""
    from tiny_lm import write_lm_recipe

    values = yaml.safe_load(write_lm_recipe(tmp_path).read_text())
    values["training"] = {"epochs": 2, "batch_size": 8, "max_length": 32, "threads": 1}
    for key in ("structure", "output"):
        del values[key]
    member = {"structure": {"kind": "lora", "rank": 8}, "lr": 2e-2}
    text = {"recipe": values, "members": [member], "seeds": [0], "output": str(tmp_path / "bench")}
    bench = Bench(BenchSpec.parse(yaml.safe_dump(text)), "test")
    summary = bench.run()
    assert summary.metric == "exact_match"
    [record] = bench.results.records.values()
    assert set(record["metrics"]) == {"accuracy", "exact_match", "loss"}
    alone = run_recipe(
        Recipe.parse(yaml.safe_dump({**record["recipe"], "output": str(tmp_path / "out")}))
    )
    assert record["metrics"] == alone.after
    assert record["num_module_parameters"] == 0
    with pytest.raises(InputError, match="'pearson' is none for the task 'answer'"):
        _ = Bench(BenchSpec.parse(yaml.safe_dump({**text, "metric": "pearson"})), "").metric
