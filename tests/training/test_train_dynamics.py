"""Every value of dynamics and objectives in a recipe: trained, broken off, taken up, loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiers import sampled
from tiny_run import Events, write_recipe

from finespun.methods.axes import AXES
from finespun.recipes.recipe import Recipe
from finespun.training.run import run

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora_pro": [{"mode": m} for m in ("light", "sgd", "full", "factored")],
    "mgpo": [{"space": s} for s in ("factors", "weights")],
    "ba_lora": [{"head": h} for h in ("own", "fresh", "warm")],
    "glad": [{"rule": "blend"}, {"rule": "orth", "every": 2}],
}
CASES = [
    f"{axis} {kind} {i}"
    for axis in ("dynamics", "objective")
    for kind in sorted(AXES[axis].known)
    if not kind.startswith("toy")
    for i in range(len(OPTIONS.get(kind, [{}])))
]


class Stops(Events):
    """Breaks the run off after its third step."""

    def tell(self, record: Any) -> None:
        super().tell(record)
        if record["event"] == "step" and record["step"] == 3:
            raise OSError("broken off")


@pytest.mark.parametrize("case", sampled(CASES, 0.1, 0.5))
def test_a_recipe_is_trained_and_resumed_bit_for_bit(tmp_path: Path, case: str) -> None:
    axis, kind, i = case.split()
    value = {"kind": kind, **OPTIONS.get(kind, [{}])[int(i)]}
    recipe = Recipe.load(write_recipe(tmp_path, epochs=1, batch_size=4))
    recipe = recipe.changed(["training.accumulate=3", f"{axis}={value}"])
    result = run(recipe)
    whole = load_file(Path(recipe.output) / "adapter.safetensors")
    assert result.num_update_parameters > 0
    assert all(bool(torch.isfinite(t).all()) for t in whole.values())
    again = recipe.changed([f"output={recipe.output}-again"])
    with pytest.raises(OSError, match="broken off"):
        run(again, reporter=Stops())
    run(again, resume=True)
    parts = load_file(Path(again.output) / "adapter.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    plain = recipe.changed([f"output={recipe.output}-plain", f"{axis}=null"])
    run(plain)
    other = load_file(Path(plain.output) / "adapter.safetensors")
    assert any(not torch.equal(whole[name], other[name]) for name in whole)
