"""Reading PEFT's folders of methods other than LoRA, in their own form.

Formats: PEFT 0.21. Methods whose frozen numbers PEFT draws from its own generator (VeRA, RandLoRA,
FourierFT, UniLoRA) are not read, because ours come from portable streams.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finespun.errors import FileError, nearest
from finespun.files import peft
from finespun.files.atomic import located, settled
from finespun.files.native import Saved, blame
from finespun.files.peft_keys import PREFIX
from finespun.files.safe import read_json, read_tensors
from finespun.hosts import Entry, FlatState
from finespun.structures import Plan, Structure, TensorSite, structure

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]
UNKNOWN = 0  # a side that the file does not tell


@dataclass(frozen=True)
class Method:
    """How one method of PEFT's becomes ours.

    `names` maps the ends of PEFT's keys to our numbers, None for what we work out ourselves;
    `options` makes our options of the config; `shape` tells (out, in) from a site's tensors;
    `turn` changes a number's layout. `used` are the config's keys that are read, `must` those that
    may have these values only.
    """

    kind: str
    names: Mapping[str, str | None]
    options: Callable[[Config], dict[str, Any]]
    shape: Callable[[Tensors], tuple[int, int]]
    used: tuple[str, ...] = ()
    must: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    turn: Callable[[str, Tensor, Config], Tensor] = lambda name, tensor, config: tensor


def ranked(config: Config) -> dict[str, Any]:
    """Rank and alpha."""
    alpha = config.get("alpha")
    return {"rank": config["r"], **({} if alpha is None else {"alpha": float(alpha)})}


def _sides(t: Tensors, name: str) -> Tensor:
    """A factor that is whole, or the product of two."""
    return t[name] if name in t else t[f"{name}_b"] @ t[f"{name}_a"]


def _kron(t: Tensors) -> tuple[int, int]:
    P, Q = _sides(t, "P"), _sides(t, "Q")
    return P.shape[0] * Q.shape[0], P.shape[1] * Q.shape[1]


def _thin(t: Tensors) -> tuple[int, int]:
    return t["B"].shape[0], t["A"].shape[1]


def _oft_inputs(t: Tensors) -> tuple[int, int]:
    count, free = t["s"].shape
    return UNKNOWN, count * round((1 + (1 + 8 * free) ** 0.5) / 2)


HADA = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
LOKR = {
    "lokr_w1": "P", "lokr_w1_a": "P_b", "lokr_w1_b": "P_a",
    "lokr_w2": "Q", "lokr_w2_a": "Q_b", "lokr_w2_b": "Q_a",
}  # fmt: skip
GRALORA = {
    "gralora_A": "A", "gralora_B": "B",
    "gralora_A_general.weight": "A_hybrid", "gralora_B_general.weight": "B_hybrid",
}  # fmt: skip
METHODS: dict[str, Method] = {
    "LOHA": Method("loha", HADA, ranked, lambda t: (len(t["B1"]), t["A1"].shape[1])),
    "LOKR": Method(
        "lokr", LOKR,
        lambda c: {**ranked(c), "decompose_both": bool(c.get("decompose_both")),
                   "factor": c.get("decompose_factor", -1)},
        _kron, ("decompose_both", "decompose_factor"),
    ),
    "HIRA": Method("hira", {"hira_A": "A", "hira_B": "B"}, ranked, _thin),
    "MISS": Method(
        "miss", {"miss_block": "D"}, lambda c: {"rank": c["r"]},
        lambda t: (t["D"].shape[1], UNKNOWN), ("mini_r",), {"init_weights": (True, False)},
    ),
    "DELORA": Method(
        "delora",
        {"delora_A": "A", "delora_B": "B", "delora_lambda": "strength", "delora_w_norm": None},
        lambda c: {"rank": c["r"]}, _thin, ("delora_lambda",),
    ),
    "GRALORA": Method(
        "gralora", GRALORA,
        lambda c: {**ranked(c), "k": c["gralora_k"], "hybrid_rank": c.get("hybrid_r", 0)},
        lambda t: (t["B"].shape[0] * t["B"].shape[1], t["A"].shape[0] * t["A"].shape[2]),
        ("gralora_k", "hybrid_r"),
        turn=lambda name, tensor, c: tensor if name.endswith("hybrid") else tensor.mT,
    ),
    "C3A": Method(
        "c3a", {"c3a_kernel": "w"}, lambda c: {"block_size": c["block_size"]},
        lambda t: (t["w"].shape[0] * t["w"].shape[2], t["w"].shape[1] * t["w"].shape[2]),
        ("block_size",),
    ),
    "BOFT": Method(
        "boft", {"boft_R": "X", "boft_s": "s"},
        lambda c: {"block_size": c["boft_block_size"],
                   "factors": c.get("boft_n_butterfly_factor", 1)},
        lambda t: (len(t["s"]), t["X"].shape[1] * t["X"].shape[2]),
        ("boft_block_size", "boft_n_butterfly_factor", "boft_block_num"),
        turn=lambda name, tensor, c: tensor.flatten() if name == "s" else tensor,
    ),
    "OFT": Method(
        "oft", {"oft_R.weight": "s"},
        lambda c: {"block_size": c["oft_block_size"],
                   "neumann": c["num_cayley_neumann_terms"] if c["use_cayley_neumann"] else 0},
        _oft_inputs, ("oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms", "eps"),
        {"coft": (False,), "block_share": (False,)},
        lambda name, tensor, c: tensor if c["use_cayley_neumann"] else -tensor,
    ),
    "IA3": Method(
        "ia3", {"ia3_l": "g"},
        lambda c: {"feedforward": list(c.get("feedforward_modules") or ())},
        lambda t: (UNKNOWN, UNKNOWN), ("feedforward_modules", "init_ia3_weights"),
        turn=lambda name, tensor, c: tensor.flatten(),
    ),
    "VBLORA": Method(
        "vblora",
        {"vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B"},
        lambda c: {"rank": c["r"], "num_vectors": c["num_vectors"], "top_k": c["topk"],
                   "vector_length": c["vector_length"]},
        lambda t: (0, 0), ("num_vectors", "vector_length", "topk", "init_logits_std",
                           "init_vector_bank_bound"),
        {"save_only_topk_weights": (False,)},
    ),
}  # fmt: skip
BANKS = {"base_model.vblora_vector_bank": "vectors"}
# Of a run's training, which ends with the file:
TRAINING = ("rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "r", "alpha")


def read_method(folder: str | Path, strict: bool = True) -> Saved:
    """The adapter in a folder that PEFT wrote, whatever its method; LoRA's are `peft.read_peft`'s.

    Raises FileError naming what is damaged, missing or not read.
    """
    place = settled(folder)
    config = read_json(place / peft.CONFIG)
    method = METHODS.get(str(config.get("peft_type")))
    if method is None:
        return peft.read_peft(folder, strict)
    notes: list[str] = []
    with blame(place / peft.CONFIG):
        _check(config, method, strict, notes)
        form = structure(method.kind, **method.options(config), dropout=_dropout(config))
    held = read_tensors(place / peft.TENSORS)
    with blame(place / peft.TENSORS):
        saved = peft._names(config.get("modules_to_save") or [])
        found, bank, whole = _sort(held.tensors, method, saved, config)
        plan = _plan(found, form, method, config)
    tensors = {f"delta/{p}/{n}": t for p, own in found.items() for n, t in own.items()}
    tensors |= {f"bank/{name}": tensor for name, tensor in bank.items()}
    tensors |= {f"trained/{m}/{k}": t for m, state in whole.items() for k, t in state.items()}
    name, base, lineage = peft._beside(place, held, notes)
    named = name or re.sub(r"[.:/]", "-", located(folder).name) or "default"
    flat = FlatState.pack(tensors)
    entry = Entry(name=named, structure=form, plan=plan, trained=tuple(whole), flat=flat)
    return Saved(entry, base, lineage, held.sha256, tuple(notes))


def _dropout(config: Config) -> float:
    """The dropout on the input of the update; its key carries the method's name."""
    own = [v for k, v in config.items() if k.endswith("_dropout") and k not in TRAINING]
    return float(own[0]) if own else 0.0


def _check(config: Config, method: Method, strict: bool, notes: list[str]) -> None:
    bias, kind = config.get("bias", "none"), config["peft_type"]
    refused = [k for k, ok in method.must.items() if k in config and config[k] not in ok]
    refused += [k for k, v in config.items() if k.endswith("_pattern") and v and "layers" not in k]
    refused += ["bias"] if bias != "none" else []
    if refused:
        told = ", ".join(f"{k}={str(config[k])[:60]}" for k in refused)
        raise FileError(f"not read for {kind}: {told}; merge it in PEFT, or save it without")
    known = {*method.used, *method.must, *peft.PASSED, *TRAINING}
    known |= {"peft_type", "bias", "modules_to_save"}
    for key, value in config.items():
        if value and key not in known and not key.endswith("_dropout"):
            told = f"{key}={str(value)[:60]} is unknown; {nearest(key, known)}"
            if strict:
                raise FileError(f"{told}; strict=False passes over it")
            notes.append(told)


def _sort(
    tensors: Mapping[str, Tensor], method: Method, saved: list[str], config: Config
) -> tuple[dict[str, Tensors], Tensors, dict[str, Tensors]]:
    """Site -> its numbers, the bank's numbers, and module -> the numbers of its own copy."""
    found: dict[str, Tensors] = {}
    bank: Tensors = {}
    whole: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        if key in BANKS:
            bank[BANKS[key]] = tensor.float()
            continue
        name = key.removeprefix(PREFIX)
        end = next((e for e in method.names if name.endswith(f".{e}")), None)
        module = peft_module(name, saved)
        if end is not None:
            own = method.names[end]
            site = found.setdefault(name.removesuffix(f".{end}"), {})
            if own is not None:
                site[own] = method.turn(own, tensor.float(), config).contiguous()
        elif module is not None:
            whole.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor
        else:
            raise FileError(
                f"{key!r} belongs to nothing that is read; {nearest(key, method.names)}"
            )
    if not found:
        raise FileError(f"there are no numbers such as {next(iter(method.names))!r}")
    return found, bank, whole


def peft_module(name: str, saved: list[str]) -> str | None:
    """The module saved whole that a key belongs to."""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((p for p in paths if any((PREFIX + p).endswith(one) for one in saved)), None)


def _plan(found: dict[str, Tensors], form: Structure, method: Method, config: Config) -> Plan:
    """The plan of these sites; `open` where the file does not tell a site's size."""
    sites, unsure = [], []
    for path, own in sorted(found.items()):
        try:
            out, inner = method.shape(own)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise FileError(f"{path!r}: its numbers {sorted(own)} do not fit together") from error
        if method.kind == "vblora":
            length = config["vector_length"]
            out, inner = (own[f"logits_{s}"].shape[s == "A"] * length for s in "BA")
        if UNKNOWN in (out, inner):
            unsure.append(path)
        sites.append(TensorSite(path, torch.empty(out or inner or 1, inner or out or 1,
                                                  device="meta")))  # fmt: skip
    plan = form.plan(sites)
    for path in unsure:
        plan = plan.choose(path, open=True)
    return plan
