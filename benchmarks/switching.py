"""Switching a SHiRA adapter on and off, against fusing a LoRA in place and taking it out again.

Both change one weight of 4096 x 4096, which is in no cache at the start. Of SHiRA, one entry in a
hundred is read and written, and again on the way back, where it is read to see that nobody edited
it: the weight is what it was, bit for bit. Of LoRA (rank 32) a product is added and taken away,
which leaves traces.

The fuse in bfloat16 rounds the adapter's parameters first. A processor with instructions for
bfloat16 does it in the time of four passes over the weight, and bare reads or writes of the
entries, each on a cache line of its own, take about one: no switch is ten times as fast there. The
fuse in float32, rounded once, is what the switch computes; without such instructions the other is
as slow.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import Tensor, nn

import finespun as fs
from benchmarks import memory
from benchmarks.measure import Line, Timed, Work, nothing, report, timed
from benchmarks.models import same
from finespun.kernels.entries import entries_of, write_entries

WIDTH, SHIRA_RANK, LORA_RANK = 4096, 21, 32
CACHE = 2**26  # bytes, more than any cache here
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Switched:
    """A linear layer with a SHiRA adapter of ours, and the layer's own weight."""

    model: nn.Module
    adapter: fs.Adapter
    own: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Switched":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(dtype)
        adapter = fs.adapt(model, fs.make("shira", rank=SHIRA_RANK), r"0", ())
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_(0.0, 0.02)
        return cls(model, adapter, model[0].weight.detach().clone())

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.model[0].weight.detach()
        return found

    def sparse(self) -> tuple[Tensor, Tensor]:
        """Where the update is not zero, and the values there."""
        index, values = self.adapter.deltas["0"].sparse()
        return index, values.detach()

    def check(self, on: Work, off: Work) -> None:
        """On, the weight is W0 + S rounded once; off, W0 again, ten times, bit for bit."""
        S = torch.zeros(self.own.numel())
        S[self.sparse()[0]] = self.sparse()[1]
        wanted = (self.own.float() + S.view_as(self.own)).to(self.own.dtype)
        for _ in range(10):
            on()
            same(self.weight, wanted, "weights switched on", 0.0)
            off()
            same(self.weight, self.own, "weights switched off", 0.0)


def library(layer: Switched) -> tuple[Work, Work]:
    """As a user switches: on and off."""
    return lambda: layer.adapter.merge(undo="entries"), layer.adapter.unmerge


def kernel(layer: Switched) -> tuple[Work, Work]:
    """The entries read and written, and written again, and nothing else."""
    W, (index, values) = layer.weight, layer.sparse()
    moved = entries_of(W, index).float() + values
    kept: list[Tensor] = []

    def on() -> None:
        kept[:] = [entries_of(W, index)]
        write_entries(W, index, moved)

    return on, lambda: write_entries(W, index, kept[0])


def bare(layer: Switched) -> Work:
    """The same entries written twice, in the dtype of the weight."""
    line, (index, _) = layer.weight.view(-1), layer.sparse()
    values = line[index]
    return both(*[lambda: line.index_copy_(0, index, values)] * 2)


def fuses(dtype: torch.dtype) -> dict[str, Work]:
    """A LoRA fused in place and out again: in the dtype of the weight, and in float32 with one
    rounding."""
    W, s = Switched.of(dtype).weight, 2.0
    B, A = torch.randn(WIDTH, LORA_RANK) * 0.02, torch.randn(LORA_RANK, WIDTH) * 0.02
    b, a = B.to(dtype), A.to(dtype)
    wanted = W.float() + s * (B @ A)

    def rounded(sign: float) -> None:
        W.copy_(W.float().addmm_(B, A, alpha=sign * s))

    found = {"LoRA": (lambda: W.addmm_(b, a, alpha=s), lambda: W.addmm_(b, a, alpha=-s))}
    if dtype != torch.float32:
        found["LoRA in float32"] = (lambda: rounded(1.0), lambda: rounded(-1.0))
    for name, (on, off) in found.items():
        on()
        same(W.float(), wanted, f"weights fused by {name}", 1e-5 if W.dtype == B.dtype else 1e-2)
        off()
    return {name: both(*ways) for name, ways in found.items()}


def both(on: Work, off: Work) -> Work:
    def work() -> None:
        on()
        off()

    return work


def theirs(layer: Switched) -> Work:
    """PEFT's SHiRA with our entries and values in a layer of its own."""
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    base[0].weight.data.copy_(layer.own)
    config = ShiraConfig(r=SHIRA_RANK, target_modules=["0"])
    model: PeftModel = get_peft_model(base, config)
    index, values = layer.sparse()
    inner = model.base_model.model[0]
    inner.shira_indices["default"] = torch.stack([index // WIDTH, index % WIDTH]).int()
    inner.shira_weight["default"].data.copy_(values)
    layer.adapter.merge(undo="entries")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about sparse tensors, said once
        model.merge_adapter()
    same(layer.weight, inner.base_layer.weight, "weights switched on")
    layer.adapter.unmerge()
    model.unmerge_adapter()
    return both(model.merge_adapter, model.unmerge_adapter)


def measure() -> list[Line]:
    """In float32 and bfloat16: the kernel, and the library as a user calls it."""
    caches = torch.zeros(CACHE // 4)
    lines = []
    for dtype in NAMES:
        layer = Switched.of(dtype)
        for ways in (library(layer), kernel(layer)):
            layer.check(*ways)
        arms = {"ours": both(*library(layer)), "kernel": both(*kernel(layer))}
        arms |= {"bare": bare(layer), **fuses(dtype)}
        if dtype == torch.float32:
            arms["PEFT"] = theirs(layer)
        with memory.kept(), torch.no_grad():
            found = timed(arms, dict.fromkeys(arms, nothing), before=lambda: caches.add_(1.0))
        lines += told(dtype, found)
    return lines


def told(dtype: torch.dtype, found: Timed) -> list[Line]:
    """A line for each way of ours and each rival."""
    name, shape = NAMES[dtype], f"{WIDTH} x {WIDTH}, {SHIRA_RANK * 2 * WIDTH:,} entries"
    lines = []
    for rival, about in (("LoRA", ""), ("LoRA in float32", ", fused in float32")):
        if rival not in found.seconds:
            continue
        note = f"{shape}; LoRA of rank {LORA_RANK}"
        if rival == "LoRA" and dtype == torch.bfloat16:
            note += ", rounded to bfloat16, on a processor " + ("with" if native() else "without")
            note += " instructions for it"
        for what, ours in (("SHiRA entries", "kernel"), ("SHiRA switched", "ours")):
            lines.append(Line.of(f"{what}, {name}{about}", found, rival, note, ours))
    floor = f"{shape}; rival: two bare writes, which keep nothing"
    lines.append(Line.of(f"SHiRA switched, {name}, the floor", found, "bare", floor))
    if "PEFT" in found.seconds:
        note = f"{shape}; rival: PEFT's SHiRA, merged and unmerged"
        lines.append(Line.of(f"SHiRA switched, {name}, beside PEFT", found, note=note))
    return lines


def native() -> bool:
    """Whether this processor multiplies in bfloat16; False where that is unknown."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8").split() if info.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


if __name__ == "__main__":
    report(measure)
