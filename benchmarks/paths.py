"""What a layer costs beside its products: forward and backward of one adapted linear layer.

Over the bare node of the graph, which makes the same three products and five in the backward pass
and looks at nothing, and against PEFT's LoRA layer with the same parameters.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import finespun as fs
from benchmarks.measure import Line, Work, report, timed
from benchmarks.models import same
from finespun.kernels.lowrank import low_rank_linear
from finespun.methods.structures import STRUCTURES

Call = Callable[[], Tensor]
SHAPES = ((64, 8, 4), (256, 64, 8), (768, 256, 16))
OTHERS = {"LSR": "lsr", "DoRA": "dora", "SHiRA": "shira"}
LEAST_GRADIENT = 1e-2


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def step(call: Call, goal: Tensor, parameters: Sequence[Tensor]) -> Work:
    """Forward and backward; gradients are thrown away."""

    def work() -> None:
        torch.autograd.grad(call(), parameters, goal)

    return work


def layer_of(
    width: int, rank: int, structure: fs.Structure | None = None
) -> tuple[One, list[nn.Parameter]]:
    """The model adapted with stirred parameters, and these."""
    model = One(width)
    adapter = fs.adapt(model, structure or fs.LoRA(rank=rank), ["layer"], ())
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.train(), adapter.parameters()


def peft_of(width: int, rank: int, numbers: list[nn.Parameter]) -> Any:
    """PEFT's layer with the same parameters."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
    model = get_peft_model(One(width), config).train()
    inner: Any = model.base_model.model.layer
    with torch.no_grad():
        inner.lora_A["default"].weight.copy_(numbers[0])
        inner.lora_B["default"].weight.copy_(numbers[1])
    return inner


def check(calls: dict[str, tuple[Call, list[nn.Parameter]]], goal: Tensor) -> None:
    """Outputs and gradients are equal, and gradients are there, before anything is timed."""
    wanted: list[Tensor] | None = None
    for name, (call, parameters) in calls.items():
        y = call()
        found = [y.detach(), *torch.autograd.grad(y, parameters, goal)]
        wanted = found if wanted is None else wanted
        for mine, theirs in zip(found, wanted):
            same(mine, theirs, f"output or gradients of {name}")
        if min(float(g.norm()) for g in found[1:]) <= LEAST_GRADIENT:
            raise RuntimeError(f"{name} has gradients of norm below {LEAST_GRADIENT}")


def against(width: int, rows: int, rank: int) -> list[Line]:
    """LoRA on one layer: ours, the bare node, and PEFT's."""
    model, numbers = layer_of(width, rank)
    layer = model.layer
    inner = peft_of(width, rank, numbers)
    own = [inner.lora_A["default"].weight, inner.lora_B["default"].weight]
    x, goal = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)
    scale = float(inner.scaling["default"])
    A, B = numbers
    calls: dict[str, tuple[Call, list[nn.Parameter]]] = {
        "ours": (partial(layer, x), numbers),
        "bare": (partial(low_rank_linear, x, layer.weight, layer.bias, A, B, scale), numbers),
        "PEFT": (partial(inner, x), own),
    }
    check(calls, goal)
    found = timed({n: step(call, goal, [*p, x]) for n, (call, p) in calls.items()})
    shape = f"layer, width {width}, {rows} rows"
    over = 1e6 * (found.median("ours") - found.median("bare"))
    note = f"rank {rank}; {over:.1f} us a layer above the bare node, forward and backward"
    return [
        Line.of(f"{shape}, beside PEFT", found, note=note),
        Line.of(f"{shape}, the bare node", found, "bare", note=note),
    ]


def others(width: int, rows: int, rank: int) -> list[Line]:
    """Other structures' layers, over LoRA's."""
    x, goal = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)
    arms, lora = {}, layer_of(width, rank)
    arms["LoRA"] = step(partial(lora[0].layer, x), goal, [*lora[1], x])
    for name, kind in OTHERS.items():
        made, numbers = layer_of(width, rank, STRUCTURES[kind](rank=rank))  # type: ignore[call-arg]
        arms[name] = step(partial(made.layer, x), goal, [*numbers, x])
    found = timed(arms)
    shape = f"width {width}, {rows} rows"
    return [Line.of(f"layer, {n}, {shape}", found, "LoRA", ours=n) for n in OTHERS]


def measure() -> list[Line]:
    """Every shape, and other structures at the smallest, where looking weighs most."""
    return [line for shape in SHAPES for line in against(*shape)] + others(*SHAPES[0])


if __name__ == "__main__":
    report(measure)
