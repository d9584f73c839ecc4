"""Starts that PEFT takes out of the base's weights, found again from these: PiSSA's and OLoRA's.

PEFT trains on W_res = W0 − s·B0 A0 and saves A and B alone; the update of the base that stands is
ΔW = s (B A − B0 A0), an exact start.
"""

import torch
from torch import Tensor, nn

from finespun.adapters.keys import Key
from finespun.contract import Plan, Structure
from finespun.driver.setup import Unmeasured
from finespun.errors import FileError, nearest
from finespun.hosts import modules, sites
from finespun.methods.axes import make
from finespun.methods.initializers.pieces.starts import Place


@torch.no_grad()
def starts(
    model: nn.Module, kind: str, structure: Structure, plan: Plan, notes: list[str]
) -> dict[Key, Tensor]:
    """A0 and B0 of every site, as PEFT makes them: in float32, by each layer's own rank and scale.
    Raises FileError where the model lacks a layer."""
    form, known, rounded = make(kind, axis="initializer"), modules(model), False
    found: dict[Key, Tensor] = {}
    for shape in plan.sites:
        if shape.name not in known:
            raise FileError(f"no module is called {shape.name!r}; {nearest(shape.name, known)}")
        site = sites(model, [shape.name], structure)[shape.name]
        delta = structure.build(site, plan)
        place = Place(shape.name, delta, plan.choices[shape.name]["rank"], Unmeasured(), 0)
        A, B = form.factors(place)
        rounded |= site.dtype in (torch.bfloat16, torch.float16)
        for leaf, tensor in (("A", A), ("B", B)):
            found[Key("site", shape.name, leaf, "start")] = tensor.cpu()
    if rounded:
        notes.append(
            f"{kind}: PEFT rounds what is left of a half-precision weight, by about 0.15 % of it, "
            "which the update here does not repeat"
        )
    return found
