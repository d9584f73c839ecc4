"""LSR's factors of all layers: formed together, against torch.kron layer by layer."""

import torch
from torch import Tensor, nn

import finespun as fs
from benchmarks.measure import Line, report, timed
from benchmarks.models import same
from finespun.contract import Delta

WIDTH, SITES, RANK, TERMS = 768, 28, 16, 16
RIVAL = "torch.kron"


def layer_by_layer(delta: Delta) -> tuple[Tensor, Tensor]:
    """A and B as sums of Kronecker products, one at a time."""
    sides = ((delta.A1, delta.A2), (delta.B1, delta.B2))
    a, b = (sum(torch.kron(p, q) for p, q in zip(first, second)) for first, second in sides)
    return a, b


def measure() -> list[Line]:
    """Forward alone, and with the backward pass to the trained parameters."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(SITES)))
    structure = fs.LSR(rank=RANK, separation_rank=TERMS)
    adapter = fs.adapt(model, structure, r"\d+", ())
    deltas = list(adapter.deltas.values())
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(0.0, 0.1)

    def together() -> list[Tensor]:
        return [t for pair in structure.form(deltas) for t in pair]

    def apart() -> list[Tensor]:
        return [t for delta in deltas for t in layer_by_layer(delta)]

    upstream = [torch.randn_like(t) for t in together()]
    numbers = adapter.parameters()
    both = [torch.autograd.grad(form(), numbers, upstream) for form in (together, apart)]
    for mine, theirs in zip(together(), apart()):
        same(mine, theirs, "factors")
    for mine, theirs in zip(*both):
        same(mine, theirs, "gradients")
    with torch.no_grad():
        forward = timed({"ours": together, RIVAL: apart})
    whole = timed(
        {
            "ours": lambda: torch.autograd.grad(together(), numbers, upstream),
            RIVAL: lambda: torch.autograd.grad(apart(), numbers, upstream),
        }
    )
    note = f"{SITES} layers {WIDTH}x{WIDTH}, rank {RANK}, {TERMS} terms"
    return [
        Line.of("form all factors of LSR", forward, RIVAL, note),
        Line.of("the same with its backward pass", whole, RIVAL, note),
    ]


if __name__ == "__main__":
    report(measure)
