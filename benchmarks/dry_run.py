"""The time that a dry run predicts, against the run: all steps, and measuring before and after.

A recipe is estimated, then loaded anew and carried out, by the same clock: processor time with one
thread, which is the time that passes on an idle machine, and on a busy one leaves out the others'.
"""

import time
from typing import Any

from benchmarks.measure import Foretold, fixed_product, report, width
from finespun.recipes.recipe import Recipe
from finespun.training.estimate import estimate
from finespun.training.run import prepare, surroundings

TIMES = 3

LORA = {"kind": "lora", "rank": 8}
LSR = {"kind": "lsr", "rank": 4, "separation_rank": 16}
ANSWERS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}


def encoder(rows: int, structure: dict[str, Any], task: str = "trec", **training: Any) -> Any:
    """A recipe for MiniLM of three layers."""
    return {
        "model": "minilm-l3",
        "data": {"builtin": task, "train_rows": rows, "test_rows": 200},
        "structure": structure,
        "targets": ["query", "value"],
        "training": {"epochs": 1, "batch_size": 32, "max_length": 64, **training},
    }


def language(pack: bool) -> Any:
    """A recipe for SmolLM2: few rows, for each takes a third of a second."""
    return {
        "model": "smollm2-135m",
        "data": {
            "builtin": "trec",
            "train_rows": 20,
            "test_rows": 16,
            "prompt": "Question: {text}\nAnswer type:",
            "answers": ANSWERS,
        },
        "structure": LORA,
        "targets": ["q_proj", "v_proj"],
        "training": {"epochs": 1, "batch_size": 4, "max_length": 96, "pack": pack},
    }


RECIPES = {
    "LoRA on questions": encoder(600, LORA),
    "LSR on questions": encoder(600, LSR),
    "LoRA on reviews": encoder(300, LORA, "movies", max_length=128),
    "LSR on all linears, 4 batches of 4 a step": {
        **encoder(200, LSR, batch_size=4, accumulate=4),
        "targets": "all-linear",
    },
    "SmolLM2": language(pack=False),
    "SmolLM2, packed": language(pack=True),
}


def carried_out(recipe: Recipe) -> tuple[float, float]:
    """Seconds of all steps, and of measuring before and after them."""
    clock = time.process_time
    with surroundings(recipe):
        job = prepare(recipe)
        marks = [clock()]
        for work in (job.measure, lambda: job.loop().run(), job.measure):
            work()
            marks.append(clock())
    start, before, trained, end = marks
    return trained - before, before - start + end - trained


def measure() -> list[Foretold]:
    """Every recipe in turn, `TIMES` times."""
    found: dict[str, list[tuple[float, float]]] = {}
    notes, products = {}, []
    for _ in range(TIMES):
        for name, values in RECIPES.items():
            recipe = Recipe.model_validate(values).changed(["training.threads=1"])
            products.append(fixed_product())
            told = estimate(recipe, clock=time.process_time)
            products.append(fixed_product())
            steps, measuring = carried_out(recipe)
            note = f"{told.train_rows} rows in {told.steps} steps, {told.test_rows} rows held out"
            pairs = {"steps": (told.seconds, steps), "measuring": (told.measuring, measuring)}
            for what, pair in pairs.items():
                found.setdefault(f"{what}, {name}", []).append(pair)
                notes[f"{what}, {name}"] = note
    spread = width(products)
    return [
        Foretold(name, [a for a, _ in taken], [b for _, b in taken], spread, notes[name])
        for name, taken in found.items()
    ]


if __name__ == "__main__":
    report(measure)
