"""Which layers of a model share hidden features: heads of attention, channels of feed-forward."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from finespun.contract import Coupling
from finespun.hosts.layers.host import Host
from finespun.hosts.targets import ATTENTION

# Names of the layers that write the features of a block, and of the one that reads them.
Roles = tuple[tuple[tuple[str, ...], str], ...]
ATTENTION_ROLES: Roles = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("query", "key", "value"), "output.dense"),
    (("query_proj", "key_proj", "value_proj"), "output.dense"),
    (("q_lin", "k_lin", "v_lin"), "out_lin"),
    (("to_q", "to_k", "to_v"), "to_out.0"),
    (("q", "k", "v"), "o"),
    (("qkv:q", "qkv:k", "qkv:v"), "proj"),
    (("c_attn:q", "c_attn:k", "c_attn:v"), "c_proj"),
)
CHANNELS: Roles = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("lin1",), "lin2"),
    (("c_fc",), "c_proj"),
    (("intermediate.dense",), "output.dense"),
)
INSIDE = ("", "self", "attention")  # where BERT's family keeps query, key and value
COUNTS = ("num_key_value_heads", "num_heads", "n_heads", "num_attention_heads", "heads")


@dataclass(frozen=True)
class Family:
    """The layers of one block that share hidden features; `core` is the module of the writers."""

    block: str
    core: str
    kind: Literal["heads", "channels"]
    writers: tuple[str, ...]
    reader: str


def family(known: Mapping[str, nn.Module], target: str) -> Family | None:
    """The family that a layer, or NAME:PART of a fused one, belongs to by its name."""
    return next(
        (
            f
            for f in _candidates(target)
            if target in (*f.writers, f.reader)
            and all(n.partition(":")[0] in known for n in (*f.writers, f.reader))
        ),
        None,
    )


def _candidates(target: str) -> Iterator[Family]:
    parts = target.split(".")
    for depth, part in enumerate(parts):
        if ATTENTION.search(part):
            block = ".".join(parts[: depth + 1])
            for writers, reader in ATTENTION_ROLES:
                for inner in INSIDE:
                    core = _join(block, inner)
                    names = tuple(_join(core, w) for w in writers)
                    yield Family(block, core, "heads", names, _join(block, reader))
            return
    for writers, reader in CHANNELS:
        for role in (*writers, reader):
            if target == role or target.endswith(f".{role}"):
                block = target[: -len(role)].rstrip(".")
                core = _join(block, writers[0].rpartition(".")[0])
                names = tuple(_join(block, w) for w in writers)
                yield Family(block, core, "channels", names, _join(block, reader))


def couple(model: nn.Module, known: Mapping[str, nn.Module], host: Host) -> Coupling | None:
    """What this host's layer shares with others of its block, None where that is not known."""
    found = family(known, host.name)
    if found is None:
        return None
    reads = host.name == found.reader
    size = host.shape.in_features if reads else host.shape.out_features
    wide, deep = width(known, found.writers[-1], "out"), width(known, found.reader, "in")
    if found.kind == "channels":
        same = wide == deep == size
        return Coupling(found.block, "in" if reads else "out", size) if same else None
    units = heads(model, known, found)
    if not units or wide % units or deep % wide or size % wide:
        return None
    return Coupling(found.block, "in" if reads else "out", units, "heads", size // wide)


def heads(model: nn.Module, known: Mapping[str, nn.Module], family: Family) -> int:
    """Heads with keys and values of their own, as the modules around the core or their configs say;
    0 where none does."""
    parts = family.core.split(".")
    around = [known.get(".".join(parts[:n])) for n in range(len(parts), 0, -1)]
    for module in (*around, model):
        for source in (module, getattr(module, "config", None)):
            for name in COUNTS:
                count: Any = getattr(source, name, None)
                if isinstance(count, int) and count > 0:
                    return count
    return 0


def width(known: Mapping[str, nn.Module], name: str, side: str) -> int:
    """Outputs, or inputs, of a linear layer or of a third of it; 1 for other modules."""
    name, _, part = name.partition(":")
    module: Any = known[name]
    sizes = getattr(module, "in_features", 1), getattr(module, "out_features", 1)
    if hasattr(module, "nf"):
        sizes = tuple(module.weight.shape)
    return int(sizes[side == "out"]) // (3 if part else 1) or 1


def _join(*parts: str) -> str:
    return ".".join(filter(None, parts))
