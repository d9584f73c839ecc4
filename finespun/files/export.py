"""Writing LoRA folders that PEFT and the servers built on its format load unchanged.

The portable profile: every scale folded into B and lora_alpha = r, one rank for all sites (zeros
fill up), plain keys, float32. Then PEFT, vLLM, SGLang, LoRAX, llama.cpp and diffusers, which differ
in how they read alpha and patterns, all compute ΔW = B A. A rank for each site, in rank_pattern and
an equal alpha_pattern, is for PEFT alone: vLLM silently ignores patterns. So is the full
form (`portable=False`): DoRA, embeddings, convolutions, biases, trained rows of tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from finespun.adapters.lineage import Lineage, lineage_of
from finespun.contract import Delta
from finespun.errors import InputError, an, nearest
from finespun.files.diffusion.write import write_adapter
from finespun.files.native import checked
from finespun.files.peft.full_form import FullForm, check_tied, full_form
from finespun.files.peft.naming import module_name, target_modules
from finespun.files.peft.root import root_of
from finespun.files.peft.write import lora_config, tokens_config, write_lora
from finespun.hosts import Attached, fingerprint, materialise, modules, plain_class
from finespun.hosts.layers.slices import SliceHost
from finespun.hosts.targets import inside
from finespun.linalg import LowRank

ONLY_PEFT = "in PEFT's own form, which most servers read in part or not at all"
Format = Literal["peft", "diffusers", "kohya"]
FORMATS: tuple[str, ...] = get_args(Format)
SERVED_RANK = 16  # the most that vLLM serves unless given otherwise
PEFT_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS", ("classifier", "score")),
    ("ForTokenClassification", "TOKEN_CLS", ("classifier", "score")),
    ("ForQuestionAnswering", "QUESTION_ANS", ("qa_outputs",)),
    ("ForCausalLM", "CAUSAL_LM", ()),
    ("LMHeadModel", "CAUSAL_LM", ()),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM", ()),
)  # the end of a class's name, PEFT's task, modules that PEFT then expects in the file


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `errors` is ‖ΔW − B A‖ / ‖ΔW‖ at each site; `trained` are the modules
    written whole, `dropped` those left out."""

    folder: Path
    rank: int
    errors: Mapping[str, float]
    trained: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """The largest of `errors`; 0.0 where the export is exact."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        how = "exact" if self.error == 0 else f"relative error up to {self.error:.2%}"
        head = f"{self.folder}: LoRA of rank {self.rank} at {len(self.errors)} layers, {how}"
        return "\n  ".join((head, *self.notes))


@torch.no_grad()
def export(
    model: nn.Module,
    name: str,
    folder: str | Path,
    rank: int | None = None,
    max_error: float | None = None,
    allow_full: bool = True,
    lineage: Lineage | None = None,
    per_module_rank: bool = False,
    portable: bool = True,
    format: Format = "peft",
    part: str | None = None,
) -> Exported:
    """Write adapter `name`, its strength included, as a PEFT LoRA folder, or as one file of
    diffusers or kohya, for which `part` names the part of the pipeline where the class does not.

    Exact where the structure has factors and `rank` is not below theirs; else the best `rank` of
    each ΔW. Without `rank`, an update that has no factors gets the smallest rank that keeps
    `max_error`, or 16. Trained modules (a head) are written in full, because without them the
    adapter computes something else; `allow_full=False` leaves them out for servers that refuse
    them. `per_module_rank` gives every layer its own rank (the least that keeps `max_error`, where
    that is given): fewer parameters, for PEFT alone. `portable=False` writes what PEFT alone reads:
    DoRA as it is, embeddings, convolutions, biases, trained rows of tables, each layer's own rank.
    Raises InputError where the error would exceed `max_error` or the format cannot say an update,
    FileError where the folder cannot be written.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank={rank} must be at least 1; try {SERVED_RANK}")
    if max_error is not None and not 0 <= max_error < 1:
        raise InputError(f"max_error={max_error} must lie in [0, 1); try 0.01")
    adapter = materialise(model, name)
    checked(adapter.lent())
    check_tied(adapter, portable)
    _check_format(adapter, format, part, portable, allow_full)
    names = list(modules(model))
    form = FullForm()
    if not portable:
        form = full_form(model, adapter, lambda n: module_name(n, (), names))
    updates = _updates(adapter, portable, ("linear",) if format == "peft" else ("linear", "conv"))
    if not updates and not form.tensors:
        raise InputError(f"{name!r} changes no weight: there is nothing a LoRA could hold")
    falling = {n: _errors(u) for n, u in updates.items()}
    chosen = _rank(adapter, falling, rank, max_error, portable)
    ranks = _ranks(falling, chosen, per_module_rank, portable, max_error)
    errors = {n: e[min(ranks[n], len(e) - 1)] for n, e in falling.items()}
    _check_errors(errors, falling, max_error, form)
    own = tuple(n for n in adapter.trained if n not in form.dropped)
    trained, dropped = (own, ()) if allow_full else ((), own)
    lineage = lineage or adapter.lineage or lineage_of(adapter.structure)
    worst = max(errors.values(), default=0.0)
    if format != "peft":
        path = write_adapter(model, adapter, updates, ranks, folder, format, part, lineage, worst)
        return Exported(path, chosen, errors, trained, dropped, ())
    _check_root(model, adapter, portable)
    _write_peft(model, adapter, folder, updates, ranks, trained, form, lineage, worst)
    several = len(set(ranks.values())) > 1
    notes = _notes(chosen, trained, dropped, several) if portable else (ONLY_PEFT,)
    return Exported(Path(folder), chosen, errors, trained, dropped, notes)


def _check_root(model: nn.Module, adapter: Attached, portable: bool) -> None:
    if root_of(model, (*adapter.deltas, *adapter.trained)).prefix and not portable:
        raise InputError(
            f"portable=False names layers by their names in {plain_class(model).__name__}: "
            "adapt its transformers_model instead, or leave portable out"
        )


def _write_peft(
    model: nn.Module,
    adapter: Attached,
    folder: str | Path,
    updates: Mapping[str, LowRank],
    ranks: Mapping[str, int],
    trained: Sequence[str],
    form: FullForm,
    lineage: Lineage,
    worst: float,
) -> None:
    """Write the folder with the names that modules have for PEFT's loaders."""
    root = root_of(model, (*adapter.deltas, *adapter.trained))
    own = {root.name(n): adapter.copies[n].state_dict() for n in trained}
    whole = {f"{n}.{k}": tensor for n, state in own.items() for k, tensor in state.items()}
    config = _config(root.model, {root.name(n): r for n, r in ranks.items()}, tuple(own), form)
    base = fingerprint(root.model, [root.name(n) for n in adapter.trained])
    named = {root.name(n): update for n, update in updates.items()}
    write_lora(folder, adapter.name, named, config, whole, base, lineage, worst, form)


def _check_format(
    adapter: Attached, format: str, part: str | None, portable: bool, allow_full: bool
) -> None:
    if format not in FORMATS:
        raise InputError(f"format={format!r} is not known; {nearest(format, FORMATS)}")
    if format == "peft":
        if part is not None:
            raise InputError(f"part={part!r} is for the formats 'diffusers' and 'kohya'")
        return
    if not portable:
        raise InputError(f"portable=False is for PEFT's format, not for {format}'s")
    if adapter.trained and allow_full:
        raise InputError(
            f"{format}'s format holds no {adapter.trained[0]!r}; allow_full=False leaves it out"
        )


def _updates(adapter: Attached, portable: bool, kinds: Sequence[str]) -> dict[str, LowRank]:
    """ΔW of every layer, strength included; parts of one layer are put together. Of a DoRA that
    stays one, B A."""
    found: dict[str, LowRank] = {}
    for name, delta in adapter.deltas.items():
        site = delta.site
        if not delta.mergeable or (portable and site.shape.kind not in kinds):
            way = "; portable=False writes it, for PEFT alone" if delta.mergeable else ""
            raise InputError(
                f"{name!r} is {an(site.shape.kind)}: a portable LoRA holds linear layers only"
                + (", or in this format of convolutions" if "conv" in kinds else "")
                + way
            )
        beside = None if portable else delta.written_beside()
        if portable:
            _check_bias(name, delta)
        if beside is None:
            update = delta.as_low_rank() * adapter.strength
        elif beside.factors is None:
            continue
        else:
            update = beside.factors
        if isinstance(site, SliceHost):
            below = site.whole.shape.out_features - site.end
            update = LowRank(update.A, F.pad(update.B, (0, 0, site.start, below)))
            name = site.whole.name
        found[name] = found[name] + update if name in found else update
    return found


def _check_errors(
    errors: Mapping[str, float],
    falling: Mapping[str, list[float]],
    max_error: float | None,
    form: FullForm,
) -> None:
    if not errors:
        return
    worst = max(errors, key=lambda n: errors[n])
    if form.config.get("use_dora") and errors[worst] > 0:
        enough = max(len(e) - 1 for e in falling.values())
        raise InputError(f"a DoRA that stays one keeps its rank; rank={enough} does")
    if max_error is not None and errors[worst] > max_error:
        enough = max(_enough(e, max_error) for e in falling.values())
        raise InputError(
            f"with the rank asked for, the update of {worst!r} is off by {errors[worst]:.2%}, more "
            f"than max_error={max_error}; rank={enough} keeps it"
        )


def _check_bias(name: str, delta: Delta) -> None:
    moved = delta.bias_change() if "map_bias" in delta.written else None
    if moved is not None and bool(moved.any()):
        raise InputError(
            f"the adapter moves the bias of {name!r}, which a plain LoRA cannot say; "
            "portable=False writes it, for PEFT alone"
        )


def _errors(update: LowRank) -> list[float]:
    """The relative error of the best approximation of rank 0, 1, ..., r; the last is 0."""
    values = update.singular_values().double()
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()
    if not len(tails) or tails[0] == 0:
        return [0.0] * (update.rank + 1)
    return [*(tails / tails[0]).tolist(), *[0.0] * (1 + update.rank - len(tails))]


def _rank(
    adapter: Attached,
    falling: Mapping[str, list[float]],
    rank: int | None,
    max_error: float | None,
    portable: bool,
) -> int:
    if rank is not None:
        return rank
    whole = max([1, *(len(e) - 1 for e in falling.values())])

    def exact(delta: Delta) -> bool:
        return delta.factors() is not None or not (portable or delta.written_beside() is None)

    if all(map(exact, adapter.deltas.values())):
        return whole
    if max_error is not None:
        return max(_enough(e, max_error) for e in falling.values())
    return min(SERVED_RANK, whole)


def _ranks(
    falling: Mapping[str, list[float]],
    chosen: int,
    own: bool,
    portable: bool,
    max_error: float | None,
) -> dict[str, int]:
    """The rank that every layer is written with: the same, or on request its own."""
    if own:
        bound = 0.0 if max_error is None else max_error
        return {n: min(chosen, _enough(e, bound)) for n, e in falling.items()}
    return {n: chosen if portable else min(chosen, len(e) - 1) for n, e in falling.items()}


def _enough(errors: list[float], max_error: float) -> int:
    """The smallest rank whose error is within the bound."""
    return max(1, next(rank for rank, error in enumerate(errors) if error <= max_error))


def _config(
    model: nn.Module, ranks: Mapping[str, int], trained: tuple[str, ...], form: FullForm
) -> dict[str, Any]:
    known, sites = modules(model), list(ranks)
    source = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if "token_indices" in form.config:
        if trained:
            raise InputError(
                f"PEFT's trainable tokens alone hold no {trained[0]!r} beside them; "
                "allow_full=False leaves it out"
            )
        tables = [k.removesuffix(".trainable_tokens_delta") for k in form.tensors]
        return tokens_config(form.config["token_indices"], tables, source)
    told = lora_config(
        ranks,
        target_modules(sites, list(known), trained),
        [module_name(n, trained, list(known)) for n in trained],
        source,
        _task(model, list(known), trained),
        any(plain_class(known[s]).__name__ == "Conv1D" for s in sites),
    )
    return {**told, **form.config}


def _task(model: nn.Module, known: list[str], trained: tuple[str, ...]) -> str | None:
    """PEFT's task type, unless PEFT would then expect modules that are not in the file, or, as with
    Whisper and models of images, call the model with tokens alone."""
    config, reads = getattr(model, "config", None), getattr(model, "main_input_name", "input_ids")
    pairs = reads == "input_ids" and getattr(config, "is_encoder_decoder", True)
    for ending, task, heads in PEFT_TASKS:
        if task == "SEQ_2_SEQ_LM" and not pairs:
            continue
        if plain_class(model).__name__.endswith(ending):
            expected = [n for n in known if n.endswith(heads)] if heads else []
            return task if all(inside(n, trained) for n in expected) else None
    return None


def _notes(
    rank: int, trained: tuple[str, ...], dropped: tuple[str, ...], patterns: bool
) -> tuple[str, ...]:
    notes = []
    if patterns:
        notes.append("every layer has its own rank, which PEFT reads and most servers ignore")
    if rank > SERVED_RANK:
        notes.append(
            f"rank {rank}: vLLM serves at most {SERVED_RANK} unless max_lora_rank is raised"
        )
    if rank > 512:
        notes.append("above 512 no setting of vLLM's admits it; export with a smaller rank")
    if trained:
        notes.append(
            f"{', '.join(trained)} written in full, for PEFT; vLLM, SGLang and llama.cpp refuse "
            "that: allow_full=False leaves it out"
        )
    if dropped:
        notes.append(f"{', '.join(dropped)} left out: the folder alone does not compute the same")
    return tuple(notes)
