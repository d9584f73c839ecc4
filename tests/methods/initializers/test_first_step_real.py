"""LoRA-GA on a real encoder: its first step follows the full gradient, the median layer's too."""

from pathlib import Path

import pytest

from finespun.driver import measure
from finespun.methods.initializers.pieces.alignment import step_cosine
from finespun.recipes.recipe import Recipe
from finespun.training.look import first_batches, weighed
from finespun.training.run import limits_of, prepare

pytestmark = pytest.mark.full
EXAMPLE = Path(__file__).parents[3] / "examples" / "trec-lora-ga.yaml"


@pytest.mark.parametrize(
    ("structure", "least"),
    [
        ("{kind: lora, rank: 8}", 0.8),
        ("{kind: lsr, rank: 4, separation_rank: 16}", 0.6),
    ],
)
def test_the_first_step_follows_the_gradient(structure, least, tmp_path):
    recipe = Recipe.load(EXAMPLE, [f"structure={structure}", f"output={tmp_path / 'x'}"])
    job = prepare(recipe)
    loop = job.loop()
    deltas = job.adapter.deltas
    rows = job.task.encode(
        job.text, job.task.read(recipe.data.source).train, limits_of(recipe.training)
    )
    batches = list(first_batches(recipe, job.task, job.text, rows))
    model = job.text.model.eval()
    seen = measure(model, list(deltas), {"gradients"}, batches, weighed(job.task))
    found = sorted(float(step_cosine(d, seen.gradient(n)).detach()) for n, d in deltas.items())
    loop.driver.close(finished=False)
    print(structure, "median", found[len(found) // 2], "least", found[0])
    assert found[len(found) // 2] >= least
