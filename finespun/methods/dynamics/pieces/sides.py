"""Which parameters stand on which side of ΔW = s B A, seen in the graph of the factors."""

import torch
from torch import nn

from finespun.contract import AdapterView
from finespun.errors import InputError


@torch.enable_grad()
def sides(adapter: AdapterView, what: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The deltas' own parameters that A reads, and those that B reads and A does not. Raises
    InputError, naming `what` asks, where one of them is empty."""
    down: dict[int, nn.Parameter] = {}
    up: dict[int, nn.Parameter] = {}
    for delta in adapter.deltas.values():
        pair, own = delta.low_rank(), list(delta.trained_parameters())
        for side, found in zip(pair or (), (down, up)):
            if side.requires_grad and own:
                read = torch.autograd.grad(side.sum(), own, allow_unused=True)
                found |= {
                    id(p): p for p, g in zip(own, read) if g is not None and id(p) not in down
                }
    if not down or not up:
        raise InputError(
            f"{what} treats A and B apart, and {adapter.structure.kind} does not train both of its "
            "own; try lora or lsr"
        )
    return list(down.values()), list(up.values())
