"""What every structure can do, found out by doing it; run, it writes docs/capabilities.md.

Every check works on a model of one layer, compares values, and fails loudly where they are
wrong. A refusal, which is an error of Finespun's own, becomes the cell's reason.
"""

import copy
import os
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

import bitsandbytes as bnb
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

import finespun as fs
from finespun.errors import FinespunError
from finespun.methods.structures import STRUCTURES

PAGE = Path(__file__).parent.parent / "capabilities.md"
IN, OUT = 32, 48
SMALL: dict[str, dict[str, object]] = {
    "gralora": {"rank": 4}, "hira": {"rank": 4}, "lora_xs": {"rank": 4}, "miss": {"rank": 4},
    "randlora": {"rank": 4}, "s2_lora": {"rank": 4}, "shira": {"rank": 2}, "tera": {"rank": 3},
    "vera": {"rank": 8}, "mora": {"rank": 2}, "oft": {"block_size": 4}, "c3a": {"block_size": 4},
    "fourierft": {"frequencies": 40}, "nola": {"rank": 4, "k": 20}, "unilora": {"size": 100},
    "vblora": {"num_vectors": 16, "vector_length": 8}, "lsr": {"separation_rank": 3},
    "loha": {"rank": 2}, "lokr": {"rank": 2}, "s2ft": {"channels": 0.1},
    "tokens": {"tokens": list(range(0, 16, 2))},
}  # fmt: skip


def three_positions_each() -> Tensor:
    return torch.randn(4, 3, IN)


def one(layer: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layer=layer))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(IN, 40), nn.Linear(40, IN)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(torch.tanh(self.down(h)))


def nf4() -> nn.Module:
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    return layer.to("cpu")


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "linear": (lambda: nn.Linear(IN, OUT), three_positions_each, "layer"),
    "Conv1D": (lambda: Conv1D(OUT, IN), three_positions_each, "layer"),
    "fused slice": (lambda: nn.Linear(IN, OUT), three_positions_each, "layer:k"),
    "embedding": (lambda: nn.Embedding(40, IN), lambda: torch.randint(40, (4, 3)), "layer"),
    "conv": (lambda: nn.Conv2d(8, 16, 3), lambda: torch.randn(4, 8, 5, 5), "layer"),
    "4-bit": (nf4, lambda: torch.randn(4, 3, 64), "layer"),
    "block": (Block, three_positions_each, "layer"),
}


class Subject:
    """One adapted layer, its parameters moved away from their start, and an input."""

    def __init__(self, form: fs.Structure, layer: str) -> None:
        torch.manual_seed(0)
        build, draw, target = LAYERS[layer]
        self.form, self.targets = form, [target]
        self.model, self.x = one(build()), draw()
        self.base = self.model(self.x).detach()
        self.plain = copy.deepcopy(self.model)
        self.adapter = self.add("one")

    def add(self, name: str) -> fs.Adapter:
        adapter = fs.adapt(self.model, self.form, self.targets, (), name, exact_start=True)
        close(self.model(self.x), self.base, "the start is not the base")
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn(p.shape))
        return adapter


def close(got: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-4) -> None:
    error = float((got - wanted).detach().norm() / wanted.detach().norm())
    assert error <= tolerance, f"{what}: {error:.2e}"


def adapts(layer: str) -> Callable[[fs.Structure], str]:
    def check(form: fs.Structure) -> str:
        subject = Subject(form, layer)
        y = subject.model(subject.x)
        if subject.adapter.num_update_parameters:
            assert not torch.equal(y, subject.base), "nothing changed"
            y.float().square().sum().backward()
            assert any(p.grad is not None and p.grad.any() for p in subject.adapter.parameters())
        with subject.adapter.disabled():
            assert torch.equal(subject.model(subject.x), subject.base), "the base is not the base"
        return "✓"

    return check


def place(form: fs.Structure) -> str:
    """The kind of layer that the structure is meant for."""
    return {"lor2c": "block", "tokens": "embedding"}.get(form.kind, "linear")


def usual(form: fs.Structure) -> Subject:
    return Subject(form, place(form))


def starts(form: fs.Structure) -> str:
    torch.manual_seed(0)
    build, draw, target = LAYERS[place(form)]
    model, x = one(build()), draw()
    base = model(x)
    fs.adapt(model, form, [target], ())
    same = torch.equal(model(x), base)
    assert same == form.starts_at_zero
    return "✓" if same else "asked for"


def mixed(form: fs.Structure) -> str:
    subject = usual(form)
    first = subject.model(subject.x)
    subject.add("two").activate()
    two = subject.model(subject.x)
    with fs.rows(subject.model, ["one", None, "two", "one"]):
        y = subject.model(subject.x)
    wanted = torch.stack([first[0], subject.base[1], two[2], first[3]])
    close(y, wanted, "mixed rows")
    return "✓"


def weighted(form: fs.Structure) -> str:
    subject = usual(form)
    first = subject.model(subject.x) - subject.base
    subject.add("two").activate()
    two = subject.model(subject.x) - subject.base
    fs.activate(subject.model, {"one": 0.7, "two": 0.3})
    close(subject.model(subject.x) - subject.base, 0.7 * first + 0.3 * two, "weighted sum")
    return "✓"


def merges(form: fs.Structure) -> str:
    subject = usual(form)
    y = subject.model(subject.x)
    subject.adapter.merge()
    close(subject.model(subject.x), y, "merged")
    subject.adapter.unmerge()
    assert torch.equal(subject.model(subject.x), y)
    subject.adapter.detach()
    assert torch.equal(subject.model(subject.x), subject.base)
    return "✓"


def saves(form: fs.Structure) -> str:
    subject = usual(form)
    with tempfile.TemporaryDirectory() as folder:
        subject.adapter.save(folder)
        fs.load(subject.plain, folder)
    both = [fs.Adapter(m, "one").attached.tensors() for m in (subject.plain, subject.model)]
    assert all(torch.equal(both[0][key], tensor) for key, tensor in both[1].items())
    close(subject.plain(subject.x), subject.model(subject.x), "loaded", 1e-6)
    return "✓"


def exports(form: fs.Structure) -> str:
    subject = usual(form)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = subject.adapter.export(folder)
        fs.load(subject.plain, folder)
    if done.error:
        return "nearest"
    close(subject.plain(subject.x), subject.model(subject.x), "exported")
    return f"rank {done.rank}"


def calculus(form: fs.Structure) -> str:
    subject = usual(form)
    shapes = {n: d.site.shape for n, d in subject.adapter.deltas.items()}
    M = {n: torch.randn(s.out_features, s.in_features) for n, s in shapes.items()}
    pulled = subject.adapter.pull(M)
    v = {n: {k: torch.randn_like(t) for k, t in own.items()} for n, own in pulled.items()}
    pushed = subject.adapter.push(v)
    for name, J in pushed.items():
        dense = J if isinstance(J, Tensor) else J.dense()
        left = sum((v[n][k] * t).sum() for n, own in pulled.items() for k, t in own.items())
        close(left.reshape(1), (dense * M[name]).sum().reshape(1), "adjoint", 1e-3)
    return "✓"


def compiles(form: fs.Structure) -> str:
    torch._dynamo.reset()
    subject = usual(form)
    y = subject.model(subject.x)
    wanted = torch.autograd.grad(y.square().sum(), subject.adapter.parameters())
    z = torch.compile(subject.model, backend="aot_eager", fullgraph=True)(subject.x)
    close(z, y, "compiled")
    got = torch.autograd.grad(z.square().sum(), subject.adapter.parameters())
    for a, b in zip(got, wanted):
        if b.norm() > 0:
            close(a, b, "compiled gradient", 1e-3)
    return "✓"


def private(form: fs.Structure) -> str:
    subject = usual(form)
    if not all(delta.per_sample for delta in subject.adapter.deltas.values()):
        raise FinespunError(
            "shared parameters, or a moved bias, do not pass through one layer's own product"
        )
    subject.model.train()
    watched = GradSampleModule(subject.model, loss_reduction="sum", strict=False)
    watched(subject.x).square().sum().backward()
    for p in subject.adapter.parameters():
        close(p.grad_sample.sum(0), p.grad, "per-sample gradients", 1e-3)
    return "✓"


def parallel(form: fs.Structure, rank: int) -> str:
    """From this process's half of the rows, the gradients of all rows."""
    subject = usual(form)
    (subject.model(subject.x).square().mean()).backward()
    wanted = [p.grad.clone() for p in subject.adapter.parameters()]
    subject.model.zero_grad()
    wrapped = DistributedDataParallel(subject.model)
    wrapped(subject.x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for p, g in zip(subject.adapter.parameters(), wanted):
        if g.norm() > 0:
            close(p.grad, g, "DDP", 1e-3)
    return "✓"


CHECKS: dict[str, Callable[[fs.Structure], str]] = {
    **{name: adapts(name) for name in LAYERS},
    "starts as the base": starts,
    "mixed rows": mixed,
    "weighted sum": weighted,
    "merge, unmerge": merges,
    "save, load": saves,
    "as a LoRA": exports,
    "push, pull": calculus,
    "compiled": compiles,
    "per-sample": private,
}


def attempt(check: Callable[..., str], kind: str, *more: int) -> str:
    """A cell: what the check says of a kind, or "!" and the refusal."""
    try:
        return check(form_of(kind), *more)
    except FinespunError as error:
        return f"!{error}"


def _process(rank: int, folder: str, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {kind: attempt(parallel, kind, rank) for kind in kinds}
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


def form_of(kind: str) -> fs.Structure:
    """A structure small enough for the model."""
    options = SMALL.get(kind, {})
    cls = STRUCTURES[kind]
    known = cls().options()
    if "rank" in known and "rank" not in options:
        options = {"rank": min(4, known["rank"]), **options}
    return cls.from_options(**options)


def found(kinds: list[str]) -> dict[str, dict[str, str]]:
    """Kind -> column -> cell."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = {kind: {name: attempt(check, kind) for name, check in CHECKS.items()} for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (folder, kinds), nprocs=2)
        for kind, cell in torch.load(f"{folder}/found").items():
            table[kind]["DDP"] = cell
    return table


def page(table: dict[str, dict[str, str]]) -> str:
    """The page: the table, and the reason of every cell that holds a letter."""
    columns = list(next(iter(table.values())))
    reasons: dict[str, str] = {}
    lines = ["| method | " + " | ".join(columns) + " |", "| --- |" + " :---: |" * len(columns)]
    for kind, cells in table.items():
        shown = []
        for cell in cells.values():
            if cell.startswith("!"):
                told = " ".join(cell[1:].split()).replace(f"{Block.__module__}.", "")
                told = told.replace(f"{kind} ", "it ", 1) if told.startswith(kind) else told
                letter = reasons.setdefault(told, str(len(reasons) + 1))
                cell = f"[{letter}](#reasons)"
            shown.append(cell)
        lines.append(f"| `{kind}` | " + " | ".join(shown) + " |")
    told = "\n".join(f"{n}. {reason}" for reason, n in reasons.items())
    return HEAD + "\n".join(lines) + "\n\n## Reasons\n\n" + told + "\n"


HEAD = """# What each method can do

Written by `docs/hooks/capabilities.py`, which tries every cell on a model of one layer and compares
the values: outputs, gradients, files. A number stands for a refusal and leads to its reason.

- **linear** to **block**: the layers that it adapts. *fused slice* is one part of a fused
  projection, *4-bit* a layer in bitsandbytes' NF4, *block* a whole block.
- **starts as the base**: before the first step nothing changes, bit for bit; *asked for* means with
  `exact_start=True`.
- **mixed rows**: another adapter for each row. **weighted sum**: two adapters active at once.
- **merge, unmerge**: into the weight, and back bit for bit.
- **as a LoRA**: the rank at which a LoRA folder holds the update exactly, for the small settings
  tried here; *nearest* means the best approximation, with its error reported.
- **push, pull**: the derivative of the update and its transpose.
- **compiled**: forward and backward in one graph of `torch.compile`.
- **per-sample**: Opacus finds every row's own gradient. **DDP**: two processes train as one.

"""


def kinds() -> list[str]:
    """Every structure, LSR first."""
    return sorted(STRUCTURES, key=lambda kind: (kind != "lsr", kind))


if __name__ == "__main__":
    PAGE.write_text(page(found(kinds())), encoding="utf-8")
