"""SmolLM2 learns TREC as a next-word answer, in small; its export gives PEFT the same logits."""

import json
from pathlib import Path

import pytest
import torch
from suite import relative

import finespun as fs
from finespun.models.zoo import find_model
from finespun.recipes.recipe import Recipe
from finespun.tasks.prompts import AnswerTokens
from finespun.training.inference import Trained
from finespun.training.run import prepare, run

RECIPE = Path(__file__).parent.parent.parent / "examples" / "smollm2-trec.yaml"


@pytest.mark.slow
def test_smollm2_learns_what_a_question_asks_for(tmp_path):
    import peft
    import transformers

    small = ["data.train_rows=160", "data.test_rows=60", "training.threads=1"]
    recipe = Recipe.load(RECIPE, [*small, f"output={tmp_path / 'out'}"])
    result = run(recipe)
    assert result.before["accuracy"] < 0.5
    assert result.before["exact_match"] < 0.1
    assert result.after["accuracy"] > result.before["accuracy"] + 0.15
    assert result.after["exact_match"] > 0.45
    assert result.after["loss"] < result.before["loss"] / 4
    assert result.num_update_parameters == 30 * 8 * ((576 + 576) + (576 + 192) + 2 * (576 + 1536))

    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    notes = [r["text"] for r in log if r["event"] == "note"]
    words = set(recipe.data.answers.values())
    assert all(n.rpartition("after ")[2].strip("'") in words for n in notes if "before" in n)

    trained = Trained.open(tmp_path / "out")
    trained.adapter.export(tmp_path / "peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(find_model("smollm2-135m"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    ids = trained.text.tokenizer("Question: Who wrote Dracula?\nAnswer type:", return_tensors="pt")
    with torch.no_grad():
        ours = trained.text.model(**ids).logits
        assert relative(theirs(**ids).logits, ours) < 1e-4
        with trained.adapter.disabled():
            assert relative(trained.text.model(**ids).logits, ours) > 1e-2
    done = fs.convert(tmp_path / "out", tmp_path / "small", fs.LoRA(rank=2))
    assert 0 < done.error < 1


@pytest.mark.slow
def test_the_chat_template_of_the_real_tokenizer_surrounds_the_question():
    recipe = Recipe.load(RECIPE, ["data.chat=true", "data.train_rows=3", "data.test_rows=3"])
    job = prepare(recipe)
    assert isinstance(job.train, AnswerTokens)
    told = job.text.tokenizer.decode(job.train.rows[0]["input_ids"])
    assert "<|im_start|>user\nQuestion: " in told
    assert told.rstrip().endswith("<|im_end|>")
    answers = [job.text.tokenizer.decode(c[:-1]) for c in job.train.candidates[0]]
    assert answers == list(recipe.data.answers.values())
