"""What PEFT's other methods write: their tensors under our names, and what their options mean.

PEFT's options are those of `make(kind, ...)` by its aliases; a site's own rank or block is in
the shapes of its tensors. Format: PEFT 0.21.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finespun.contract import SiteShape
from finespun.errors import FileError
from finespun.files.lora import meant, through
from finespun.files.peft.as_lora import drawn, means, randlora, unilora, vera
from finespun.storage.blame import finite_number

Found = Mapping[str, Tensor]
Config = Mapping[str, Any]
Options = dict[str, Any]
# what acts while training and starting only; nothing is left of it in a file
START_OPTIONS = frozenset(
    ["init_weights", "init_ia3_weights", "rank_dropout", "rank_dropout_scale"]
)
LYCORIS = frozenset(["rank_pattern", "alpha_pattern", "use_effective_conv2d"])
CORES = {"use_effective_conv2d=True": "cores of convolutions are multiplied into a factor"}
MOST_TERMS = 100  # of a series that converges as a geometric one
FAR = -1e4  # the logit of a vector that is not chosen


def _same(found: Found, site: SiteShape, config: Config) -> Found:
    return found


def _nothing(*given: Any) -> Options:
    return {}


@dataclass(frozen=True)
class Reading:
    """How one of PEFT's methods is read: our `kind`, our name of each tensor (None: not needed),
    and what has to be done to tensors and options.

    `change` makes our tensors of a site's, `options` gives options of the whole, `site` those of
    one site by its own tensors, `choice` what its plan says beside them. `fixed` are options with
    the only values that are read, and why no other is; `unused` are those that the tensors show;
    `notes` say what a person should know of OPTION=VALUE. `factors` reads the method as a LoRA,
    from the site's tensors and those that all share; without these, `needs` says what to do.
    `drawn` makes, for a model, the tensors of sites that a file leaves to PEFT's generator.
    """

    kind: str
    names: Mapping[str, str | None]
    change: Callable[[Found, SiteShape, Config], Found] = _same
    options: Callable[[Config, Mapping[str, Found]], Options] = _nothing
    site: Callable[[Found, SiteShape, Config], Options] = _nothing
    choice: Callable[[Found, SiteShape, Config], Options] = _nothing
    fixed: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    notes: Mapping[str, str] = field(default_factory=dict)
    factors: Callable[[Found, Found, SiteShape, Config], tuple[Tensor, Tensor]] | None = None
    drawn: Callable[[Any, Config, Found], dict[str, dict[str, Tensor]]] | None = None
    needs: str = ""


def _matrices(found: Found, site: SiteShape, config: Config) -> Found:
    return {n: t.flatten(1) for n, t in found.items()}


def _gralora(found: Found, site: SiteShape, config: Config) -> Found:
    return {n: t.mT if n in ("A", "B") else t for n, t in found.items()}


def _length(option: str, name: str, dim: int = 0) -> Callable[[Found, SiteShape, Config], Options]:
    """A site's own option, which is the length of one of its tensors."""
    return lambda found, *_: {option: found[name].shape[dim]}


def _shira(found: Found, site: SiteShape, config: Config) -> Found:
    rows, columns = found["entries"].long()
    entries, order = (rows * site.in_features + columns).sort()
    return {"entries": entries, "v": found["v"][order]}


def _feeds(config: Config, name: str, g: Tensor) -> bool:
    """Whether a gain acts on the input: then it has one row; a convolution's never shows it."""
    told = config.get("feedforward_modules") or []
    if g.dim() == 2:
        return len(g) == 1
    return means(told, name) if isinstance(told, str) else name.endswith(tuple(told))


def _ia3(config: Config, found: Mapping[str, Found]) -> Options:
    return {"feedforward_modules": [p for p, t in found.items() if _feeds(config, p, t["g"])]}


def _gains(found: Found, site: SiteShape, config: Config) -> Found:
    """Of a convolution a channel has one gain, our columns have each their own."""
    g = found["g"].flatten()
    if _feeds(config, site.name, found["g"]):
        g = g.repeat_interleave(site.in_features // len(g))
    return {"g": g}


def _block(count: int) -> int:
    """b of b(b − 1)/2 parameters."""
    return round((1 + (1 + 8 * count) ** 0.5) / 2)


def _oft(config: Config, found: Mapping[str, Found]) -> Options:
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann") else 0
    if terms > MOST_TERMS:
        raise FileError(f"num_cayley_neumann_terms={terms} is more than {MOST_TERMS}")
    size = _block(next(iter(found.values()))["s"].shape[1])
    # PEFT 0.21 takes four terms where three are asked for
    return {"oft_block_size": size, "num_cayley_neumann_terms": 4 if terms == 3 else terms}


def _turned(found: Found, site: SiteShape, config: Config) -> Found:
    """Without its series PEFT turns the other way. COFT keeps ‖S‖ <= eps/√n, shortening what the
    last step of training left longer; of shared blocks there is n = 1 in the file."""
    if site.kind == "conv":
        raise FileError(
            f"{site.name!r} is a convolution, whose patches PEFT turns one by one but merges as one"
            " weight; an OFT of linear layers is read"
        )
    s = found["s"].float()
    if config.get("coft"):
        most = float(config["eps"]) / len(s) ** 0.5
        lengths = 2**0.5 * torch.linalg.vector_norm(s, dim=1, keepdim=True)
        s = s * (most / lengths.clamp_min(most))
    if config.get("block_share"):
        s = s.repeat(site.in_features // _block(s.shape[1]), 1)
    return {"s": s if config.get("use_cayley_neumann") else -s}


def _boft(config: Config, found: Mapping[str, Found]) -> Options:
    factors, _, size, _ = next(iter(found.values()))["X"].shape
    return {"boft_block_size": size, "boft_n_butterfly_factor": factors}


def _miss(found: Found, site: SiteShape, config: Config) -> Found:
    """The "mini" form repeats a narrow D over the outputs."""
    mini = config.get("init_weights") == "mini"
    repeats = site.out_features // found["D"].shape[1] if mini else 1
    return {"D": found["D"].repeat(1, repeats)}


def _vblora(found: Found, site: SiteShape, config: Config) -> Found:
    """Of the weights of the chosen vectors, which sum to one, all but the last are in the file."""
    if not config.get("save_only_topk_weights"):
        return found
    logits = {}
    for side in "AB":
        index, weights = found[f"index_{side}"].long(), found[f"weights_{side}"].float()
        every = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1).clamp_min(1e-30).log()
        none = torch.full((*index.shape[:-1], config["num_vectors"]), FAR)
        logits[f"logits_{side}"] = none.scatter(-1, index, every)
    return logits


def _without_cores(*sides: tuple[str, str, str]) -> Callable[[Found, SiteShape, Config], Found]:
    """Factors A and Bᵀ that meet in a core T, as two; `sides` are (T, A, B)."""

    def change(found: Found, site: SiteShape, config: Config) -> Found:
        made = dict(_matrices(found, site, config))
        for core, a, b in sides:
            if made.pop(core, None) is not None:
                made[a], made[b] = through(found[core], found[a])[0], found[b].T.contiguous()
        return made

    return change


def _alpha(rank: int, site: SiteShape, config: Config) -> Options:
    """Rank and alpha of a LoHa or LoKr, which patterns may give."""
    ranks, alphas = meant({**config, "lora_alpha": config["alpha"]}, site.name)
    if rank not in ranks:
        raise FileError(f"{site.name!r} is of rank {rank}, the config gives it {ranks[0]}")
    return {"rank": rank, "alpha": finite_number(alphas[0], f"{site.name!r}: alpha")}


def _loha(found: Found, site: SiteShape, config: Config) -> Options:
    return _alpha(len(found["A1"]), site, config)


def _lokr(found: Found, site: SiteShape, config: Config) -> Options:
    """Where nothing has rank r, only the config gives it."""
    low = found.get("Q_a", found.get("P_a"))
    ranks = meant(config, site.name)[0]
    return _alpha(ranks[0] if low is None else len(low), site, config)


def _lokr_forms(found: Found, site: SiteShape, config: Config) -> Options:
    """(u_out, u_in), (v_out, v_in), and the ranks of P and Q, 0 for one in full. Of a convolution
    PEFT divides the channels, not the columns."""
    sides, ranks = [], []
    for name in "PQ":
        whole = found.get(name)
        left, right = (found[f"{name}_b"], found[f"{name}_a"]) if whole is None else (whole, whole)
        sides.append([len(left), right.shape[1]])
        ranks.append(len(right) if whole is None else 0)
    (u_out, u_in), (v_out, v_in) = sides
    if (u_out * v_out, u_in * v_in) != (site.out_features, site.in_features):
        raise FileError(f"{site.name!r}: {sides[0]} times {sides[1]} is not its size")
    return {"u": sides[0], "v": sides[1], "ranks": ranks}


PROJECTED = frozenset(["r", "projection_prng_key", "save_projection"])
DRAWN = frozenset(["r", "proj_seed", "theta_d_length", "init_theta_d_bound", "save_indices"])
SAVE_PROJECTION = "the frozen projections are missing; save it with save_projection=True"
METHODS: Mapping[str, Reading] = {
    "BOFT": Reading(
        "boft",
        {"boft_R": "X", "boft_s": "s"},
        lambda found, *_: {"X": found["X"], "s": found["s"].flatten()},
        _boft,
        unused=frozenset(["boft_block_num"]),
    ),
    "C3A": Reading(
        "c3a",
        {"c3a_kernel": "w"},
        site=_length("block_size", "w", -1),
        unused=frozenset(["block_size_pattern"]),
    ),
    "DELORA": Reading(
        "delora",
        {"delora_A": "A", "delora_B": "B", "delora_lambda": "strength", "delora_w_norm": None},
        site=_length("rank", "A"),
        unused=frozenset(["rank_pattern", "lambda_pattern"]),
    ),
    "FOURIERFT": Reading(
        "fourierft",
        {"fourierft_spectrum": "c"},
        options=lambda config, found: {"draw": "torch"},
        site=_length("frequencies", "c"),
        unused=frozenset(["n_frequency_pattern"]),
    ),
    "GRALORA": Reading(
        "gralora",
        {
            "gralora_A": "A",
            "gralora_B": "B",
            "gralora_A_general.weight": "A_hybrid",
            "gralora_B_general.weight": "B_hybrid",
        },
        _gralora,
        site=_length("rank", "A", 1),
    ),
    "HIRA": Reading(
        "hira",
        {f"hira_{kind}{side}": side for side in "AB" for kind in ("", "embedding_")},
        _matrices,
        site=_length("rank", "A"),
        unused=frozenset(["rank_pattern"]),
    ),
    "IA3": Reading("ia3", {"ia3_l": "g"}, _gains, _ia3),
    "LOHA": Reading(
        "loha",
        {
            **{f"hada_w{side}_a": f"B{side}" for side in "12"},
            **{f"hada_w{side}_b": f"A{side}" for side in "12"},
            **{f"hada_t{side}": f"T{side}" for side in "12"},
        },
        _without_cores(("T1", "A1", "B1"), ("T2", "A2", "B2")),
        site=_loha,
        unused=LYCORIS,
        notes=CORES,
    ),
    "LOKR": Reading(
        "lokr",
        {
            **{"lokr_w1": "P", "lokr_w1_a": "P_b", "lokr_w1_b": "P_a"},
            **{"lokr_w2": "Q", "lokr_w2_a": "Q_b", "lokr_w2_b": "Q_a", "lokr_t2": "T"},
        },
        _without_cores(("T", "Q_a", "Q_b")),
        site=_lokr,
        choice=_lokr_forms,
        unused=LYCORIS,
        notes=CORES,
    ),
    "MISS": Reading(
        "miss",
        {"miss_block": "D"},
        _miss,
        site=_length("rank", "D"),
        fixed={
            "init_weights": ((True, False, "mini"), "its update is W0·M + M, which no LoRA holds")
        },
        unused=frozenset(["mini_r"]),
        notes={"init_weights=mini": "the repeated columns move apart when it is trained on"},
    ),
    "OFT": Reading(
        "oft",
        {"oft_R.weight": "s"},
        _turned,
        _oft,
        lambda found, *_: {"block_size": _block(found["s"].shape[1])},
        unused=frozenset(["r", "eps", "use_cayley_neumann", "coft", "block_share"]),
        notes={
            "coft=True": "the bound eps is not kept when it is trained on",
            "block_share=True": "every block turns on its own when it is trained on",
        },
    ),
    "RANDLORA": Reading(
        "lora",
        {},
        factors=randlora,
        needs=SAVE_PROJECTION,
        unused=PROJECTED | {"randlora_alpha", "sparse", "very_sparse"},
    ),
    "SHIRA": Reading(
        "shira",
        {"shira_weight": "v", "shira_indices": "entries"},
        _shira,
        lambda config, found: {"mask_type": "given", "random_seed": 0},
    ),
    "UNILORA": Reading(
        "lora", {}, factors=unilora, drawn=drawn, needs="unilora_theta_d is missing", unused=DRAWN
    ),
    "VBLORA": Reading(
        "vblora",
        {
            **{f"vblora_logits_{side}": f"logits_{side}" for side in "AB"},
            **{f"vblora_logits_{side}_topk_indices": f"index_{side}" for side in "AB"},
            **{f"vblora_logits_{side}_topk_weights": f"weights_{side}" for side in "AB"},
        },
        _vblora,
        site=_length("rank", "logits_A"),
        unused=frozenset(["init_logits_std", "save_only_topk_weights"]),
        notes={
            "save_only_topk_weights=True": "only the chosen vectors were saved: their weights can "
            "be trained on, the choice stays"
        },
    ),
    "VERA": Reading(
        "lora",
        {},
        factors=vera,
        needs=SAVE_PROJECTION,
        unused=PROJECTED | {"d_initial"},
    ),
}
BANK_TENSORS = {"vblora_vector_bank": "vectors"}
PEFT_TYPES = ("LORA", "TRAINABLE_TOKENS", *METHODS)
