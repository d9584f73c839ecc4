"""Forward and backward of one training step: frozen base, our LoRA, PEFT's LoRA, our LSR."""

from torch import Tensor, nn

import finespun as fs
from benchmarks.measure import Line, Work, report, timed
from benchmarks.models import LINEARS, hidden, llama, pair, same, tokens

SHAPES = ((768, 2, 512, 16), (384, 4, 256, 16), (256, 2, 64, 8))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return hidden(model, ids).square().mean()


def step(model: nn.Module, ids: Tensor, numbers: list[nn.Parameter]) -> Work:
    def work() -> None:
        loss(model, ids).backward()
        for p in numbers:
            p.grad = None

    return work


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def check(ours: nn.Module, theirs: nn.Module, ids: Tensor) -> None:
    """Outputs and gradients are equal before anything is timed."""
    ours.eval()
    theirs.eval()
    same(hidden(ours, ids), hidden(theirs, ids), "hidden states")
    loss(ours, ids).backward()
    loss(theirs, ids).backward()
    adapter = fs.Adapter(ours, "default")
    for site, delta in adapter.deltas.items():
        layer = theirs.base_model.model.get_submodule(site)
        same(delta.A.grad, layer.lora_A["default"].weight.grad, f"gradients of A at {site}")
        same(delta.B.grad, layer.lora_B["default"].weight.grad, f"gradients of B at {site}")
    for model in (ours, theirs):
        model.train()
        model.zero_grad()


def frozen(width: int, layers: int) -> nn.Module:
    """The base with gradients of its activations and none of its weights but the embedding's."""
    model = llama(width, layers).requires_grad_(False).train()
    model.embed_tokens.requires_grad_(True)
    return model


def measure() -> list[Line]:
    """The step at three shapes, with and without dropout; ratios to the base in the notes."""
    lines = []
    for width, layers, count, rank in SHAPES:
        ids = tokens(1, count)
        base = frozen(width, layers)
        spun = llama(width, layers).train()
        lsr = fs.adapt(spun, fs.LSR(rank=rank, separation_rank=16), LINEARS, ())
        for dropout in (0.0, 0.05):
            ours, theirs = pair(width, layers, rank, dropout=dropout)
            check(ours, theirs, ids)
            arms = {
                "ours": step(ours, ids, trained(ours)),
                "PEFT": step(theirs, ids, trained(theirs)),
                "frozen": step(base, ids, trained(base)),
            }
            if dropout == 0.0:
                arms["LSR"] = step(spun, ids, lsr.parameters())
            found = timed(arms)
            against = {n: found.median(n) / found.median("frozen") for n in arms if n != "frozen"}
            told = ", ".join(f"{n} {r:.2f}" for n, r in against.items())
            what = f"step, width {width}, " + (f"dropout {dropout}" if dropout else "no dropout")
            note = f"{layers} layers, {count} tokens, rank {rank}; over the frozen base: {told}"
            lines.append(Line.of(what, found, note=note))
            if dropout == 0.0:
                lines.append(Line.of(f"LSR step, width {width}", found, note=note, ours="LSR"))
    return lines


if __name__ == "__main__":
    report(measure)
