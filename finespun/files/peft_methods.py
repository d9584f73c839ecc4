"""Reading checkpoints of PEFT's other methods: their own options and tensors, under our names.

PEFT's options are those of `structure(kind, ...)` by its aliases. Sizes that such a file does not
tell are the model's, so a model is needed. Methods whose frozen numbers PEFT draws in its own way
are read as the LoRA that they are: VeRA as B' = diag(b)·B, A' = diag(d)·A, RandLoRA as its bases
side by side. Format: PEFT 0.21.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finespun.errors import FileError, TargetError, nearest
from finespun.files.atomic import settled
from finespun.files.native import Saved, blame, named_after
from finespun.files.peft import CONFIG, PASSED, TENSORS
from finespun.files.peft_keys import PREFIX, saved_module
from finespun.files.safe import read_json, read_tensors
from finespun.hosts import Entry, FlatState, modules, sites
from finespun.structures import STRUCTURES, LoRA, Plan, SiteShape, Structure, structure

Found = Mapping[str, Tensor]
Config = Mapping[str, Any]
SHARED = "base_model."
# what acts while training and starting only; nothing is left of it in a file
STARTS = frozenset(["init_weights", "init_ia3_weights", "rank_dropout", "rank_dropout_scale"])
OFF: tuple[Any, ...] = (None, False, 0, 0.0, "none", "", {}, [])


def _same(found: Found, site: SiteShape, config: Config) -> Found:
    return found


@dataclass(frozen=True)
class Method:
    """How one of PEFT's methods is read: our `kind`, our name of each tensor (None: not
    needed), and what has to be
    done to the tensors or the options. `fixed` are options with the only values that are read,
    `unused` those that say nothing."""

    kind: str
    names: Mapping[str, str | None]
    change: Callable[[Found, SiteShape, Config], Found] = _same
    options: Callable[[Config, Mapping[str, Found]], dict[str, Any]] = lambda config, found: {}
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


def _gralora(found: Found, site: SiteShape, config: Config) -> Found:
    return {n: t.mT if n in ("A", "B") else t for n, t in found.items()}


def _flat(name: str) -> Callable[[Found, SiteShape, Config], Found]:
    return lambda found, *_: {n: t.flatten() if n == name else t for n, t in found.items()}


def _shira(found: Found, site: SiteShape, config: Config) -> Found:
    rows, columns = found["entries"].long()
    entries, order = (rows * site.in_features + columns).sort()
    return {"entries": entries, "v": found["v"][order]}


def _ia3(config: Config, found: Mapping[str, Found]) -> dict[str, Any]:
    """A gain of one row acts on the input."""
    return {"feedforward_modules": [p for p, t in found.items() if len(t["ia3_l"]) == 1]}


def _oft(config: Config, found: Mapping[str, Found]) -> dict[str, Any]:
    """The block size is in the tensors: b(b − 1)/2 numbers a block."""
    counts = {t["oft_R.weight"].shape[1] for t in found.values()}
    sizes = sorted(round((1 + (1 + 8 * count) ** 0.5) / 2) for count in counts)
    if len(sizes) > 1:
        raise FileError(f"oft_block_size is {sizes} in different layers; one for all is read")
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann") else 0
    # PEFT 0.21 takes four terms where three are asked for
    return {"oft_block_size": sizes[0], "num_cayley_neumann_terms": 4 if terms == 3 else terms}


def _turned(found: Found, site: SiteShape, config: Config) -> Found:
    """Without its series PEFT turns the other way."""
    return found if config.get("use_cayley_neumann") else {"s": -found["s"]}


def _boft(config: Config, found: Mapping[str, Found]) -> dict[str, Any]:
    factors, _, size, _ = next(iter(found.values()))["boft_R"].shape
    return {"boft_block_size": size, "boft_n_butterfly_factor": factors}


def _vera(found: Found, shared: Found, site: SiteShape, config: Config) -> tuple[Tensor, Tensor]:
    b, d = found["vera_lambda_b"], found["vera_lambda_d"]
    A, B = shared["vera_A"], shared["vera_B"]
    return d[:, None] * A[:, : site.in_features], b[:, None] * B[: site.out_features]


def _randlora(
    found: Found, shared: Found, site: SiteShape, config: Config
) -> tuple[Tensor, Tensor]:
    """PEFT pairs the rows (rank, base) of one side with the columns (base, rank) of the other, both
    counted through, and swaps the sides where in > out."""
    short, long = sorted((site.in_features, site.out_features))
    lambda_, gamma = found["randlora_lambda"], found["randlora_gamma"]
    bases = lambda_.shape[1]
    small = shared["randlora_A"][:, :, :short] * lambda_[:, :, None] * gamma[None]
    large = shared["randlora_B"][:long, :bases] * (config["randlora_alpha"] / config["r"])
    rows, columns = small.flatten(end_dim=1), large.flatten(1)
    return (columns.T, rows.T) if site.in_features > site.out_features else (rows, columns)


METHODS: Mapping[str, Method] = {
    "BOFT": Method(
        "boft",
        {"boft_R": "X", "boft_s": "s"},
        _flat("s"),
        _boft,
        unused=frozenset(["boft_block_num"]),
    ),
    "C3A": Method("c3a", {"c3a_kernel": "w"}),
    "DELORA": Method(
        "delora",
        {"delora_A": "A", "delora_B": "B", "delora_lambda": "strength", "delora_w_norm": None},
    ),
    "FOURIERFT": Method(
        "fourierft", {"fourierft_spectrum": "c"}, options=lambda config, found: {"draw": "torch"}
    ),
    "GRALORA": Method(
        "gralora",
        {
            "gralora_A": "A",
            "gralora_B": "B",
            "gralora_A_general.weight": "A_hybrid",
            "gralora_B_general.weight": "B_hybrid",
        },
        _gralora,
    ),
    "HIRA": Method("hira", {"hira_A": "A", "hira_B": "B"}),
    "IA3": Method("ia3", {"ia3_l": "g"}, _flat("g"), _ia3),
    "LOHA": Method(
        "loha", {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
    ),
    "LOKR": Method(
        "lokr",
        {
            "lokr_w1": "P",
            "lokr_w1_a": "P_b",
            "lokr_w1_b": "P_a",
            "lokr_w2": "Q",
            "lokr_w2_a": "Q_b",
            "lokr_w2_b": "Q_a",
        },
    ),
    "MISS": Method(
        "miss",
        {"miss_block": "D"},
        fixed={"init_weights": (True, False)},
        unused=frozenset(["mini_r"]),
    ),
    "OFT": Method(
        "oft",
        {"oft_R.weight": "s"},
        _turned,
        _oft,
        unused=frozenset(["r", "eps", "use_cayley_neumann"]),
    ),
    "SHIRA": Method(
        "shira",
        {"shira_weight": "v", "shira_indices": "entries"},
        _shira,
        lambda config, found: {"mask_type": "given", "random_seed": 0},
    ),
    "VBLORA": Method(
        "vblora",
        {"vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B"},
        unused=frozenset(["init_logits_std"]),
    ),
}
BANKS = {"vblora_vector_bank": "vectors"}
AS_LORA = {"VERA": _vera, "RANDLORA": _randlora}
KINDS = ("LORA", "TRAINABLE_TOKENS", *METHODS, *AS_LORA)


def read_method(folder: str | Path, model: nn.Module, strict: bool = True) -> Saved | None:
    """The adapter in a folder of PEFT's, for `model`; None where its method is none of these.

    Raises FileError naming the method, option or tensor that is not read, TargetError for a layer
    that the model lacks.
    """
    place = settled(folder)
    config = read_json(place / CONFIG) if (place / CONFIG).is_file() else {}
    kind = str(config.get("peft_type", "LORA"))
    if kind not in KINDS:
        raise FileError(
            f"{place / CONFIG}: peft_type is {kind[:60]!r}, which is not read; read are "
            + ", ".join(KINDS)
        )
    if kind not in METHODS and kind not in AS_LORA:
        return None
    held = read_tensors(place / TENSORS)
    notes: list[str] = []
    with blame(place):
        saved = config.get("modules_to_save") or []
        found, shared, whole = _sort(held.tensors, [str(n) for n in saved])
    known = modules(model)
    for path in found.keys() - known.keys():
        raise TargetError(f"no module is called {path!r}; {nearest(path, known)}")
    with blame(place):
        if kind in METHODS:
            made = _structure(METHODS[kind], config, found, strict, notes)
            plan, tensors = _own(METHODS[kind], made, model, found, shared, config)
        else:
            made, plan, tensors = _as_lora(AS_LORA[kind], model, found, shared, config)
            notes.append(f"{kind} is read as the LoRA of rank {made.rank} that it is")
    tensors |= {f"trained/{m}/{k}": t for m, state in whole.items() for k, t in state.items()}
    entry = Entry(
        named_after(folder), made, plan, trained=tuple(whole), flat=FlatState.pack(tensors)
    )
    return Saved(entry, None, None, held.sha256, tuple(notes))


def _sort(
    tensors: Found, saved: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Tensors by site, those that all sites share, and modules saved whole."""
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        parts, module = name.split("."), saved_module(name, saved)
        if name == key:
            if not key.startswith(SHARED):
                raise FileError(f"{key!r} does not begin with {PREFIX!r}")
            shared[key.removeprefix(SHARED)] = tensor
        elif module is not None:
            whole.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor
        else:
            place = len(parts) - (2 if parts[-1] == "weight" else 1)
            found.setdefault(".".join(parts[:place]), {})[".".join(parts[place:])] = tensor
    if not found:
        raise FileError(f"{TENSORS} holds no layer's tensors")
    return found, shared, whole


def _structure(
    method: Method, config: Config, found: Mapping[str, Found], strict: bool, notes: list[str]
) -> Structure:
    known = STRUCTURES[method.kind]
    options = {**config, **method.options(config, found)}
    own = {f.name for f in known.__dataclass_fields__.values()} | set(known.aliases)
    taken = {k: v for k, v in options.items() if k in own - {"seed"} and k not in method.unused}
    passed = {*own, *PASSED, *STARTS, *method.unused, "peft_type", "modules_to_save", "dropout"}
    for key, value in config.items():
        allowed = method.fixed.get(key)
        if allowed is not None and value not in allowed:
            raise FileError(f"{key}={str(value)[:60]} is not read; only {allowed} are")
        if allowed is None and value not in OFF and key not in passed and "dropout" not in key:
            told = f"{key}={str(value)[:60]} is not read; {nearest(key, own)}"
            if strict:
                raise FileError(f"{told}; strict=False passes over it")
            notes.append(told)
    return structure(method.kind, **taken)


def _own(
    method: Method,
    made: Structure,
    model: nn.Module,
    found: Mapping[str, Found],
    shared: Found,
    config: Config,
) -> tuple[Plan, dict[str, Tensor]]:
    hosts = sites(model, found, made)
    plan, tensors = made.plan(list(hosts.values())), dict[str, Tensor]()
    for path, state in found.items():
        own: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name not in method.names:
                raise FileError(
                    f"'{PREFIX}{path}.{name}' is unknown; {nearest(name, method.names)}"
                )
            if (ours := method.names[name]) is not None:
                own[ours] = tensor
        tensors |= {
            f"delta/{path}/{n}": t for n, t in method.change(own, hosts[path].shape, config).items()
        }
    return plan, {**tensors, **{f"bank/{BANKS[n]}": t for n, t in shared.items()}}


def _as_lora(
    factors: Callable[[Found, Found, SiteShape, Config], tuple[Tensor, Tensor]],
    model: nn.Module,
    found: Mapping[str, Found],
    shared: Found,
    config: Config,
) -> tuple[LoRA, Plan, dict[str, Tensor]]:
    hosts, tensors, choices = sites(model, found, LoRA()), dict[str, Tensor](), {}
    if not shared:
        raise FileError("the frozen projections are missing; save it with save_projection=True")
    for path, state in found.items():
        A, B = factors(state, shared, hosts[path].shape, config)
        tensors |= {f"delta/{path}/A": A.contiguous(), f"delta/{path}/B": B.contiguous()}
        choices[path] = {"rank": len(A), "scale": 1.0}
    most = max(int(c["rank"]) for c in choices.values())
    made = LoRA(rank=most, alpha=float(most))
    return made, Plan(tuple(h.shape for h in hosts.values()), choices), tensors
