"""Causal language models that answer: what is labelled, packed, cut, measured, trained."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from suite import relative, stir
from tiny_lm import PROMPT, language_model, tokenizer, write_lm_recipe
from torch.nn import functional

import finespun as fs
from finespun.cli.app import run as cli
from finespun.errors import InputError
from finespun.recipes.recipe import Recipe
from finespun.tasks import AnswerPrompt
from finespun.tasks.batches import Batches
from finespun.tasks.prompts import (
    AnswerTokens,
    Asker,
    answer_words,
    collate,
    segment_mask,
    tokenize_answers,
)
from finespun.tasks.scoring import continue_prompts, measure, score
from finespun.tasks.tables import LabelledTexts
from finespun.tasks.task import IGNORED, Limits
from finespun.training.inference import Trained
from finespun.training.loop import Loop
from finespun.training.output import Result
from finespun.training.run import prepare, run

TEXTS = ("the cat runs today", "a dog sleeps", "the ship stops soon the train runs", "fine")
TASK = AnswerPrompt(prompt=PROMPT, classes=("bad", "good"))
ROWS = LabelledTexts(TEXTS, None, (1, 0, 1, 0), ("bad", "good"))
WORDS = ["bad", "very good"]
FAMILIES = ["llama", "gpt2"]


def rows(pack: bool = False, slices: bool = True, max_length: int = 32) -> AnswerTokens:
    return tokenize_answers(
        Asker(tokenizer(), PROMPT), ROWS, WORDS, Limits(max_length, pack), slices
    )


# --- tokens --------------------------------------------------------------------------------------
def test_prompt_answer_and_end_are_there_and_only_the_answer_is_labelled():
    tok, found = tokenizer(), rows()
    for i, text in enumerate(TEXTS):
        words = WORDS[ROWS.labels[i]]
        assert tok.decode(found.prompt_ids(i)) == f"Text : {text} Kind :"
        batch = collate(found, [i])
        labels = batch["labels"][0]
        answer = labels[labels != IGNORED].tolist()
        assert answer == [*tok(words).input_ids, tok.eos_token_id]
        assert batch["input_ids"][0].tolist()[-len(answer) :] == answer
        assert TASK.weight(batch) == len(answer)
        assert TASK.count(batch) == 1


def test_a_batch_is_padded_on_the_left():
    found = rows()
    batch = collate(found, [0, 1, 2, 3])
    for row, i in enumerate(range(4)):
        real = batch["attention_mask"][row].bool()
        ids = found.rows[i]["input_ids"]
        assert batch["input_ids"][row][real].tolist() == ids
        assert batch["position_ids"][row][real].tolist() == list(range(len(ids)))
        assert not real[: -len(ids)].any()


@pytest.mark.parametrize("room", [11, 13, 15])
def test_texts_are_cut_and_answers_never(room):
    tok, found = tokenizer(), rows(max_length=room)
    assert found.cut == sum(len(tok(t).input_ids) + 4 + 3 > room for t in TEXTS)
    assert max(found.lengths) <= room
    assert found.report == f"{found.cut} of 4 rows ({25 * found.cut:.1f} %) cut at {room} tokens"
    for i in range(4):
        assert tok.decode(found.prompt_ids(i)).endswith(" Kind :")
        assert found.candidates[i] == rows().candidates[i]


def test_no_room_for_any_text_is_refused():
    with pytest.raises(InputError, match=r"max_length leaves 4 tokens .* without any of the text"):
        rows(max_length=7)


def test_a_chat_template_surrounds_the_prompt():
    tok = tokenizer()
    asker = Asker(tok, PROMPT, chat=True)
    assert asker.prompt("the {text} cat") == "user : Text: the {text} cat\nKind: answer :"
    found = tokenize_answers(asker, ROWS, WORDS, Limits(32))
    assert tok.decode(found.prompt_ids(3)) == "user : Text : fine Kind : answer :"
    tok.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        Asker(tok, PROMPT, chat=True)


def test_pairs_fill_both_places_and_braces_in_texts_stay():
    asker = Asker(tokenizer(), "{pair} said {text}:")
    assert asker.prompt("{pair} a", "{text} b") == "{text} b said {pair} a:"


def test_an_answer_must_not_melt_into_the_prompt():
    with pytest.raises(InputError, match=r"'' melts into the end of the prompt"):
        Asker(tokenizer(), PROMPT).answer("Kind:", "")


def test_answers_are_one_for_each_class():
    assert answer_words(("a", "b"), {"a": "x", "b": "y"}) == ["x", "y"]
    for answers, told in (
        ({"a": "x", "c": "y"}, "names 'c'"),
        ({"a": "x"}, "no words for 'b'"),
        ({"a": "x", "b": "x"}, "differ"),
    ):
        with pytest.raises(InputError, match=told):
            answer_words(("a", "b"), answers)


# --- the loss ------------------------------------------------------------------------------------
def by_hand(model, found: AnswerTokens) -> torch.Tensor:
    """Mean −log p over answer tokens, a row at a time, with nothing clever."""
    total, count = torch.zeros(()), 0
    for i in range(len(found)):
        ids = torch.tensor([found.rows[i]["input_ids"]])
        log_p = functional.log_softmax(model(input_ids=ids).logits[0].float(), -1)
        for k in range(found.begins[i], ids.shape[1]):
            total, count = total - log_p[k - 1, ids[0, k]], count + 1
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("pack", "slices"), [(False, True), (False, False), (True, True)])
def test_padded_sliced_and_packed_losses_are_that_of_single_rows(family, pack, slices):
    model, found = language_model(family).double(), rows(pack, slices)
    adapter = fs.adapt(model, fs.LoRA(rank=2), "all-linear")
    stir(adapter.parameters())
    batch = collate(found, [0, 1, 2, 3])
    if pack:
        batch["attention_mask"] = batch["attention_mask"].double()
    assert ("logits_to_keep" in batch) == (slices and not pack)
    assert TASK.count(batch) == 4
    wanted = by_hand(model, found)
    loss = model(**batch).loss
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for a, b in zip(*(torch.autograd.grad(x, adapter.parameters()) for x in (loss, wanted))):
        assert relative(a, b) < 1e-4
    assert TASK.weight(batch) == sum(
        len(found.rows[i]["input_ids"]) - found.begins[i] for i in range(4)
    )


@pytest.mark.parametrize("pack", [False, True])
def test_accumulated_batches_have_the_gradient_of_one(tmp_path, pack):
    def gradients(size: int, accumulate: int) -> list[torch.Tensor]:
        recipe = Recipe.load(write_lm_recipe(tmp_path), [f"training.pack={pack}"])
        job = prepare(recipe)
        stir(job.adapter.parameters())
        training = recipe.training.model_copy(
            update={"batch_size": size, "accumulate": accumulate, "max_grad_norm": 0.0}
        )
        batches = Batches(job.task, job.train, size)
        batches.order = lambda epoch: [list(range(i, i + size)) for i in range(0, 12, size)]
        loop = Loop(job.adapter, batches, training, 1e-9)
        stream = batches.epoch()
        loop.take([next(stream) for _ in range(accumulate)])
        return [p.grad for p in job.adapter.parameters()]

    for one, many in zip(gradients(12, 1), gradients(3, 4)):
        assert relative(many, one) < 1e-4


def test_who_sees_whom():
    seen = segment_mask(torch.tensor([[-1, 0, 0, 1, 1, 2]]))[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]


# --- measuring -----------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slices", [True, False])
def test_all_candidates_in_one_pass_score_as_on_their_own(family, slices):
    model, found = language_model(family).requires_grad_(False), rows(slices=slices)
    scores = score(model, found)
    for i in range(len(found)):
        for j, candidate in enumerate(found.candidates[i]):
            prompt = found.prompt_ids(i)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + candidate])).logits[0]
            log_p = functional.log_softmax(logits[len(prompt) - 1 : -1], -1)
            gained = log_p.gather(1, torch.tensor(candidate)[:, None])
            assert scores.words[i][j] == pytest.approx(float(gained[:-1].sum()), abs=1e-4)
            if j == found.right[i]:
                assert scores.losses[i] == pytest.approx(-float(gained.sum()), abs=1e-4)
                assert scores.tokens[i] == len(candidate)
    metrics = measure(model, found)
    assert metrics["loss"] == pytest.approx(float(by_hand(model, found)), abs=1e-4)
    assert set(metrics) == {"accuracy", "exact_match", "loss"}


# --- runs ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of a language model in out."""
    folder = tmp_path_factory.mktemp("lm")
    run(Recipe.load(write_lm_recipe(folder)))
    return folder


def test_a_run_learns_to_answer(done):
    result = Result.read(done / "out")
    assert result.after["accuracy"] == result.after["exact_match"] == 1.0
    assert result.after["loss"] < 0.1 < result.before["loss"]
    assert result.before["exact_match"] == 0.0
    assert result.num_module_parameters == 0
    log = [json.loads(line) for line in (done / "out" / "metrics.jsonl").open()]
    told = [record["text"] for record in log if record["event"] == "note"]
    assert len([t for t in told if "before" in t and "after" in t]) == 3


def test_exact_match_is_what_generate_says(done):
    trained = Trained.open(done / "out")
    recipe, text = trained.recipe, trained.text
    job_rows = prepare(recipe).test
    with trained.adapter.disabled():
        before = score(text.model, job_rows).exact
    after = score(text.model, job_rows).exact
    prompts = [job_rows.prompt_ids(i) for i in range(len(job_rows))]
    said = continue_prompts(text.model, text.tokenizer, prompts, 4)
    wanted = ["good" if job_rows.labels[i] else "bad" for i in range(len(job_rows))]
    assert [s == w for s, w in zip(said, wanted)] == after
    assert not any(before)


def test_evaluate_and_predict_take_the_run_up_again(done, capsys):
    result = Result.read(done / "out")
    assert Trained.open(done / "out").evaluate() == pytest.approx(result.after)
    table = done / "table.csv"
    assert Trained.open(done / "out").evaluate(table)["accuracy"] == 1.0
    assert cli(["predict", str(done / "out"), "the cat runs fine", "a dull dog"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in shown] == ["good", "bad"]
    for line in shown:
        assert 0.5 < float(line.split("\t")[1]) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True])
def test_an_interrupted_run_goes_on_as_if_nothing_was(tmp_path, pack):
    class StoppedError(Exception):
        pass

    from finespun.training.progress import Reporter

    class Stopper(Reporter):
        def tell(self, record):
            if record["event"] == "checkpoint" and record["step"] == 8:
                raise StoppedError

    changes = [f"training.pack={pack}", "training.checkpoint_every=4", "training.epochs=2"]
    recipe = Recipe.load(write_lm_recipe(tmp_path), changes)
    whole = recipe.changed([f"output={tmp_path / 'whole'}"])
    run(whole)
    with pytest.raises(StoppedError):
        run(recipe, reporter=Stopper())
    result = run(recipe, resume=True)
    assert result.after == Result.read(tmp_path / "whole").after
    a, b = ((tmp_path / n / "adapter.safetensors").read_bytes() for n in ("out", "whole"))
    assert a == b


def test_packing_trains_the_same_adapter(tmp_path):
    losses = []
    for pack in (False, True):
        changes = [f"training.pack={pack}", "training.epochs=2"]
        loop = prepare(Recipe.load(write_lm_recipe(tmp_path), changes)).loop()
        loop.run()
        losses.append(torch.tensor(loop.losses))
    assert relative(losses[1], losses[0]) < 1e-3


def test_pefts_reader_gives_equal_logits(done):
    import peft

    trained = Trained.open(done / "out")
    trained.adapter.export(done / "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(language_model(), done / "peft").eval()
    ids = torch.tensor([[5, 9, 14, 17, 20, 6]])
    with torch.no_grad():
        assert relative(trained.text.model(ids).logits, theirs(ids).logits) < 1e-5


def test_free_answers_are_generated_and_measured(tmp_path, capsys):
    words = ("cat", "dog", "ship", "train", "today", "soon", "runs")
    pairs = [(a, b) for a in words for b in words]
    lines = ["text,label", *(f"the {a} {b},{b} {a}" for a, b in pairs)]
    (tmp_path / "free.csv").write_text("\n".join(lines) + "\n")
    short = {"epochs": 1}
    path = write_lm_recipe(tmp_path, data={"file": str(tmp_path / "free.csv")}, training=short)
    result = run(Recipe.load(path))
    assert set(result.after) == {"exact_match", "loss"}
    assert (result.train_rows, result.test_rows, len(result.task["classes"])) == (39, 10, 49)
    assert result.after["loss"] < result.before["loss"]
    assert cli(["predict", str(tmp_path / "out"), "the cat runs"]) == 0
    said, _, text = capsys.readouterr().out.rstrip("\n").rpartition("\t")
    assert text == "the cat runs"
    trained = Trained.open(tmp_path / "out")
    prompt = Asker(trained.text.tokenizer, PROMPT).ids("Text: the cat runs\nKind:")
    assert continue_prompts(trained.text.model, trained.text.tokenizer, [prompt], 24) == [said]


# --- recipes -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.prompt='Kind:'", r"must hold \{text\} and no other braces"),
        ("data.prompt='{txt}: {text}'", r"must hold \{text\}"),
        ("data.pair=other", r"\{text\} and \{pair\}"),
        ("data.answers={bad: nope}", "answers has no words for 'good'"),
        ("training.max_length=6", "max_length leaves"),
        ("model=minilm-l3", "is no language model: 'cls"),
        ("data.train_rows=0", "train_rows"),
    ],
)
def test_unlawful_recipes_say_what_would_work(tmp_path, change, told):
    path = write_lm_recipe(tmp_path)
    with pytest.raises(fs.FinespunError, match=told):
        prepare(Recipe.load(path, [change]))


@pytest.mark.parametrize("change", ["data.chat=true", "data.answers={a: b}", "training.pack=true"])
def test_options_of_prompts_need_a_prompt(tmp_path, change):
    with pytest.raises(InputError, match="prompt"):
        Recipe.load(write_lm_recipe(tmp_path), ["data.prompt=null", change])


def test_rows_can_be_limited(tmp_path):
    changes = ["data.train_rows=10", "data.test_rows=5"]
    job = prepare(Recipe.load(write_lm_recipe(tmp_path), changes))
    assert (len(job.train), len(job.test)) == (10, 5)
    assert math.isfinite(job.measure()["loss"])


def test_the_example_is_a_lawful_recipe():
    recipe = Recipe.load(Path(__file__).parent.parent.parent / "examples" / "smollm2-trec.yaml")
    assert Recipe.parse(recipe.dump()).dump() == recipe.dump()
