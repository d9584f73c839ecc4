"""Reading LoRA files of diffusers and of kohya's scripts: one safetensors file, no config.

A key is the layer's path and what the tensor is: `unet.mid_block.proj_in.lora_A.weight`, or with
underscores and kohya's words `lora_unet_mid_block_proj_in.lora_down.weight`. The scale is alpha
over the tensor's own rank, and 1 where the file has no alpha; diffusers' metadata wins over both.
LoHa and LoKr: arXiv 2309.14859. Paths are those in the file until `place_on` finds the layers.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from finespun.adapters.fingerprint import Fingerprint
from finespun.adapters.keys import Key, of_site
from finespun.adapters.lineage import Lineage
from finespun.adapters.state import AdapterState
from finespun.contract import Plan, SiteShape, Structure
from finespun.errors import FileError, nearest
from finespun.files.diffusion.names import PIPELINE_PARTS, Unplaced, split_kohya
from finespun.files.lora import Pair, check_config, settle_pair, through
from finespun.files.saved import named_after
from finespun.methods.structures import DoRA, LoHa, LoKr, LoRA
from finespun.storage.blame import blame
from finespun.storage.memory_limit import bounded
from finespun.storage.safe_io import parse_json, read_tensors

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA, OURS = "lora_adapter_metadata", "finespun"
LEAVES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    **{f"hada_{n}": n for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{n}": n for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "alpha": "alpha",
}
NOT_READ = {
    "dora_scale": "DoRA's magnitudes over inputs",
    "lora_B.bias": "a bias on lora_B",
    "lora_up.bias": "a bias on lora_up",
    "diff": "a whole weight's difference",
    "diff_b": "a bias's difference",
    "w_norm": "a norm's difference",
    "b_norm": "a norm's difference",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "on_input": "IA3",
}
CONFIGURED = ("lora", "dora")  # kinds whose scale the metadata may tell
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LEAF = re.compile(
    rf"(.+?)\.({'|'.join(map(re.escape, sorted({**LEAVES, **NOT_READ}, key=len, reverse=True)))})"
)
_OLD = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")


class Piece(NamedTuple):
    """One layer's parameters as a structure of ours has them. `inner` counts a kernel's parameters
    too; `kernel` is (in, k, ...) where the file gives it."""

    kind: str
    out: int
    inner: int
    rank: int
    scaled: bool
    tensors: dict[str, Tensor]
    kernel: tuple[int, ...] = ()


def read_diffusion(path: str | Path, strict: bool = True) -> Unplaced:
    """The adapter in one safetensors file of diffusers or kohya, named after the file or, where
    that has diffusers' usual name, its folder.

    With `strict` off, unknown keys of diffusers' metadata become notes. Raises FileError naming the
    key that is unknown, missing or ill-shaped.
    """
    path = Path(path)
    if path.suffix in PICKLED:
        raise FileError(
            f"{path} is pickled and not opened; have the program that wrote it save .safetensors"
        )
    named = path.parent if path.name == WEIGHTS else path.with_suffix("")
    held = read_tensors(path)
    with blame(path), bounded(str(path)):
        found = _sort(held.tensors)
        kohya = {name: split_kohya(name) for name in found}
        if any(kohya.values()) and not all(kohya.values()):
            one, other = next(n for n in kohya if kohya[n]), next(n for n in kohya if not kohya[n])
            raise FileError(f"{one!r} is kohya's spelling and {other!r} is not")
        where = {name: split or _part(name) for name, split in kohya.items()}
        alphas = {name: _alpha(name, own.pop("alpha", None)) for name, own in found.items()}
        pieces = {name: _piece(name, own) for name, own in found.items()}
        structure, tensors, choices = _structure(pieces)
        told = parse_json(held.metadata.get(METADATA, "{}").encode(), METADATA)
        parts = sorted({where[n][0] for n, p in pieces.items() if p.kind in CONFIGURED})
        notes = [note for part in parts for note in _checked(_config(told, part), strict)]
        for name, piece in pieces.items():
            choices[name]["scale"] = _scale(piece, alphas[name], told, *where[name])
        shapes = [
            SiteShape(name, p.out, p.inner, "conv" if len(p.kernel) > 1 else "linear")
            for name, p in pieces.items()
        ]
        told_name, base, lineage = _beside(held.metadata)
    state = AdapterState.pack(
        told_name or named_after(named),
        structure,
        Plan(tuple(shapes), choices),
        tensors,
        lineage=lineage,
        base=base,
    )
    return Unplaced(
        state,
        held.sha256,
        tuple(dict.fromkeys(notes)),
        style="kohya" if any(kohya.values()) else "diffusers",
        where=where,
        kernels={n: p.kernel for n, p in pieces.items() if len(p.kernel) > 1},
    )


def _sort(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> what its tensors are -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        name, leaf = _split(key)
        own = found.setdefault(name.replace(".processor.", "."), {})
        if leaf in own:
            raise FileError(f"{key!r} repeats what another key of {name!r} gives")
        own[leaf] = tensor.float() if leaf != "alpha" else tensor
    if not found:
        raise FileError("there is no tensor in it")
    return found


def _split(key: str) -> tuple[str, str]:
    if old := _OLD.fullmatch(key):
        path, side, leaf = old.groups()
        if path.endswith("self_attn"):  # a text encoder's attention
            return f"{path}.{side}_proj", leaf
        return f"{path}.to_{'out.0' if side == 'out' else side}", leaf
    parts = _LEAF.fullmatch(key)
    if parts is None:
        end = key.split(".", 1)[1] if split_kohya(key.split(".")[0]) and "." in key else key
        end = ".".join(end.split(".")[-2:])
        raise FileError(f"{key!r} is no tensor of a LoRA, LoHa or LoKr; {nearest(end, LEAVES)}")
    if parts[2] in NOT_READ:
        raise FileError(f"{key!r} is {NOT_READ[parts[2]]}, which is not read")
    return parts[1], LEAVES[parts[2]] if "lora" in parts[2] or parts[2] == "alpha" else parts[2]


def _part(name: str) -> tuple[str, str]:
    first, _, rest = name.partition(".")
    return (first, rest) if first in PIPELINE_PARTS and rest else ("", name)


def _alpha(name: str, tensor: Tensor | None) -> float | None:
    if tensor is None:
        return None
    if tensor.numel() != 1:
        raise FileError(f"'{name}.alpha' is {tuple(tensor.shape)}, expected one number")
    return float(tensor)


def _config(told: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """What diffusers' metadata says of one part of the model; it may know of no parts."""
    own = {k.removeprefix(f"{part}."): v for k, v in told.items() if k.startswith(f"{part}.")}
    return own if part else told


def _checked(config: Mapping[str, Any], strict: bool) -> list[str]:
    notes: list[str] = []
    if config:
        check_config({"peft_type": "LORA", **config}, strict, notes)
    return notes


def _scale(
    piece: Piece, alpha: float | None, told: Mapping[str, Any], part: str, path: str
) -> float:
    """alpha / r; what diffusers' metadata says of this part of the model goes before."""
    config = _config(told, part)
    if not config or piece.kind not in CONFIGURED:
        return 1.0 if alpha is None or not piece.scaled else alpha / piece.rank
    pair = Pair("linear", piece.tensors["A"], piece.tensors["B"])
    return float(settle_pair(path, pair, config, [])[1]["scale"])


# --- one layer ------------------------------------------------------------------------------
def _piece(name: str, own: Mapping[str, Tensor]) -> Piece:
    kinds = [
        kind
        for kind, marks in (("lora", ("down", "up", "m")), ("loha", ("hada",)), ("lokr", ("lokr",)))
        if any(leaf.startswith(marks) for leaf in own)
    ]
    if len(kinds) != 1:
        raise FileError(f"{name!r} holds {', '.join(kinds) or 'nothing but alpha or a middle'}")
    short = {leaf.removeprefix("hada_").removeprefix("lokr_"): t for leaf, t in own.items()}
    try:
        return {"lora": _lora, "loha": _loha, "lokr": _lokr}[kinds[0]](short)
    except KeyError as error:
        raise FileError(f"{name!r}: its {error.args[0]!r} is missing") from error
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{leaf} {tuple(t.shape)}" for leaf, t in own.items())
        raise FileError(f"{name!r} is ill-shaped: {shapes}") from error


def _lora(own: Mapping[str, Tensor]) -> Piece:
    """B = up, A = down, or with a middle A[p] = Σ_q mid[p, q] * down[q], * over the kernel; m are
    the lengths of DoRA's rows."""
    down, up = own["down"], _flat(own["up"])
    A, kernel = down.flatten(1), tuple(down.shape[1:])
    if "mid" in own:
        A, kernel = through(own["mid"], _flat(down))
    _agree(A.dim() == up.dim() == 2 and A.shape[0] == up.shape[1])
    tensors = {"A": A, "B": up}
    if "m" in own:
        tensors["m"] = own["m"].flatten()
        _agree(len(tensors["m"]) == len(up))
    kind = "dora" if "m" in own else "lora"
    return Piece(kind, up.shape[0], A.shape[1], len(A), True, tensors, kernel)


def _loha(own: Mapping[str, Tensor]) -> Piece:
    """(B1 A1) ∘ (B2 A2), with cores t1 and t2 for the kernel where they are given."""
    tensors: dict[str, Tensor] = {}
    kernel: tuple[int, ...] = ()
    for side in "12":
        B, A = own[f"w{side}_a"], own[f"w{side}_b"]
        if f"t{side}" in own:
            B, (A, kernel) = B.mT, through(own[f"t{side}"], A)
        _agree(A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1])
        tensors |= {f"A{side}": A, f"B{side}": B}
    A, B = tensors["A1"], tensors["B1"]
    _agree(A.shape == tensors["A2"].shape and B.shape == tensors["B2"].shape)
    return Piece("loha", len(B), A.shape[1], len(A), True, tensors, kernel)


def _lokr(own: Mapping[str, Tensor]) -> Piece:
    """P ⊗ Q. Where neither has factors, alpha says nothing and the scale is 1."""
    kernel: tuple[int, ...] = ()
    P = own["w1"] if "w1" in own else own["w1_a"] @ own["w1_b"]
    tensors = {"P": P}
    if "w2" in own:
        tensors["Q"] = own["w2"].flatten(1)
        rows, columns, kernel = *tensors["Q"].shape, tuple(own["w2"].shape[1:])
    else:
        Q_b, Q_a = own["w2_a"], own["w2_b"]
        if "t2" in own:
            Q_b, (Q_a, kernel) = Q_b.mT, through(own["t2"], Q_a)
        _agree(Q_a.dim() == Q_b.dim() == 2 and Q_a.shape[0] == Q_b.shape[1])
        tensors |= {"Q_b": Q_b, "Q_a": Q_a}
        rows, columns = len(Q_b), Q_a.shape[1]
    _agree(P.dim() == 2)
    low = next((own[leaf] for leaf in ("w2_b", "w1_b") if leaf in own), None)
    if len(kernel) > 1:
        kernel = (P.shape[1] * kernel[0], *kernel[1:])
    rank = 1 if low is None else len(low)
    out, inner = P.shape[0] * rows, P.shape[1] * columns
    return Piece("lokr", out, inner, rank, low is not None, tensors, kernel)


def _flat(tensor: Tensor) -> Tensor:
    """The matrix that a 1x1 kernel is."""
    _agree(tensor.dim() > 1 and all(k == 1 for k in tensor.shape[2:]))
    return tensor.flatten(1)


def _agree(fits: bool) -> None:
    if not fits:
        raise ValueError("shapes do not agree")


# --- all layers -----------------------------------------------------------------------------
def _structure(
    pieces: Mapping[str, Piece],
) -> tuple[Structure, dict[Key, Tensor], dict[str, dict[str, Any]]]:
    """The one structure that holds all layers, its tensors and the plan's choices."""
    kinds = {p.kind: name for name, p in pieces.items()}
    if len(kinds) > 1:
        told = ", ".join(f"{name!r} is a {kind}" for kind, name in kinds.items())
        raise FileError(f"one adapter has one structure, here {told}")
    kind, rank = next(iter(kinds)), max(p.rank for p in pieces.values())
    choices: dict[str, dict[str, Any]] = {n: {"rank": p.rank} for n, p in pieces.items()}
    own = {name: dict(p.tensors) for name, p in pieces.items()}
    structure: Structure
    if kind == "lokr":
        structure = _hold_lokr(own, choices, rank)
    else:
        structure = {"lora": LoRA, "dora": DoRA, "loha": LoHa}[kind](rank=rank, alpha=rank)
    tensors: dict[Key, Tensor] = {}
    for name, held in own.items():
        tensors |= of_site(name, held)
    return structure, tensors, choices


def _hold_lokr(
    own: Mapping[str, dict[str, Tensor]], choices: dict[str, dict[str, Any]], rank: int
) -> LoKr:
    """A LoKr whose rule for when Q has factors agrees with every layer: that of the file where it
    does, else one under which every Q is whole."""
    sides = {}
    for name, held in own.items():
        P, Q_b, Q_a = held["P"], held.get("Q_b", held.get("Q")), held.get("Q_a", held.get("Q"))
        sides[name] = [len(Q_b), Q_a.shape[1]]  # type: ignore[arg-type, union-attr]
        choices[name] |= {"u": list(P.shape), "v": sides[name]}
    low = {name: "Q_a" in held for name, held in own.items()}
    if all((2 * rank < max(sides[name])) == low[name] for name in own):
        return LoKr(rank=rank, alpha=rank)
    for name, held in own.items():
        if low[name]:
            held["Q"] = held.pop("Q_b") @ held.pop("Q_a")
    return LoKr(rank=max(max(v) for v in sides.values()), alpha=rank)


def _beside(metadata: Mapping[str, str]) -> tuple[str | None, Fingerprint | None, Lineage | None]:
    """Name, base and lineage, where Finespun wrote the file."""
    if OURS not in metadata:
        return None, None, None
    told = parse_json(metadata[OURS].encode(), OURS)
    base = told["base"]
    return (
        str(told["name"]),
        None if base is None else Fingerprint.from_json(base, OURS),
        Lineage.from_json(told["lineage"], OURS),
    )
