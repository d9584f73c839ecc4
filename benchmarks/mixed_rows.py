"""Eight adapters in one batch, one for each row: a prompt of 64 tokens, and a single token."""

import torch

import finespun as fs
from benchmarks.measure import Line, report, timed
from benchmarks.models import hidden, llama, pair, same, tokens

WIDTH, LAYERS, RANK, COUNT = 512, 4, 16, 8


@torch.no_grad()
def measure() -> list[Line]:
    """Against PEFT's `adapter_names`, and over the base model in the notes."""
    names = [f"n{i}" for i in range(COUNT)]
    ours, theirs = pair(WIDTH, LAYERS, RANK, names)
    base = llama(WIDTH, LAYERS).eval()
    ours.eval()
    theirs.eval()
    lines = []
    for length, what in ((64, "mixed rows, 8 prompts of 64"), (1, "mixed rows, 8 single tokens")):
        ids = tokens(COUNT, length)

        def mixed(ids: torch.Tensor = ids) -> torch.Tensor:
            with fs.rows(ours, names):
                return hidden(ours, ids)

        def mixed_theirs(ids: torch.Tensor = ids) -> torch.Tensor:
            return hidden(theirs, ids, adapter_names=names)

        def one(ids: torch.Tensor = ids) -> torch.Tensor:
            return hidden(ours, ids)

        same(mixed(), mixed_theirs(), "hidden states")
        found = timed(
            {
                "ours": mixed,
                "PEFT": mixed_theirs,
                "one": one,
                "base": lambda ids=ids: hidden(base, ids),
            }
        )
        over = {n: found.median(n) / found.median("base") for n in ("ours", "PEFT", "one")}
        told = ", ".join(f"{n} {r:.2f}" for n, r in over.items())
        note = f"{LAYERS} layers of width {WIDTH}, rank {RANK}; over the base: {told}"
        lines.append(Line.of(what, found, note=note))
    return lines


if __name__ == "__main__":
    report(measure)
