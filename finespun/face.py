"""What `import finespun as fs` offers for a model: adapt, load, list, train together, detach."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from finespun import adapter as holder
from finespun import hosts
from finespun.adapter import Adapter
from finespun.contract import Initializer, Scores, Structure
from finespun.deprecated import renamed
from finespun.driver.gradients import Loss
from finespun.errors import InputError
from finespun.files.hub import download, is_repository
from finespun.hosts.left_out import left_out
from finespun.hosts.targets import Targets
from finespun.methods.axes import STRUCTURE, make

# PEFT's words for what `adapt` is asked -> how it is asked here.
WORDS = {
    "target_modules": "targets=",
    "exclude_modules": "exclude=",
    "layers_to_transform": "layers=",
    "adapter_name": "name=",
    "ensure_weight_tying": 'tie="both"',
    "inference_mode": "adapter.make_trainable(), or fs.load(..., trainable=False)",
    "is_trainable": "adapter.make_trainable()",
    "peft_config": "the structure, such as fs.LoRA(rank=8)",
    "peft_type": "the structure, such as fs.LoRA(rank=8)",
    "task_type": "not needed: the head is found by the model's class; train_modules= names others",
    "bias": "train_modules=, which names modules that are trained whole",
    "fan_in_fan_out": "not needed: it is read off the layer",
    "init_lora_weights": "the structure's start=, or initializer=",
    "rank_pattern": "scores=, or one adapt() with a name= for each rank",
    "alpha_pattern": "one adapt() with a name= for each alpha",
}


@renamed(train="train_modules")
def adapt(
    model: nn.Module,
    structure: Structure | str,
    targets: Targets = "all-linear",
    train_modules: Sequence[str] | None = None,
    name: str = "default",
    exact_start: bool = False,
    scores: Scores | None = None,
    exclude: Targets = (),
    layers: Iterable[int] | None = None,
    tie: Literal["both"] | None = None,
    modules_to_save: Sequence[str] | None = None,
    initializer: Initializer | None = None,
    batches: Iterable[Any] = (),
    loss: Loss | None = None,
    **options: Any,
) -> Adapter:
    """Attach a new trainable adapter; the model stays the object and the class it was.

    `structure` is one such as `fs.LSR(rank=4)`, or its name in any case, whose options may follow:
    `fs.adapt(model, "lora", rank=4)`. A layer that cannot hold the rank gets the largest that it
    holds, with a warning.
    `targets`, `exclude` and `layers` are those of `hosts.find`; left out, every linear layer but
    the output head is adapted, and printing the adapter says what was not. An empty list leaves
    layers alone: only modules are trained. `train_modules` (PEFT's `modules_to_save`): modules of
    which the adapter trains its own copy; None means the task head that the model's class
    announces. Where a target shares its weight with another module, the update acts at the target
    alone, or with tie="both" at both uses. `exact_start` makes a start that is not zero equal the
    base. `initializer` says where the update starts; what it looks at is measured on `batches`, in
    eval mode, by `loss(model, batch)` (that which the model returns). Every other parameter of the
    model is frozen until `detach`; another adapter that is trained rests (`make_trainable` lets
    several train at once).

    Raises TargetError, PlanError or InputError, which answers an argument of PEFT with its name
    here; the model stays as it was.
    """
    made = holder.adapt(
        model,
        _structure(structure, options),
        targets,
        train_modules,
        name,
        exact_start,
        scores,
        exclude,
        layers,
        tie,
        modules_to_save,
        initializer,
        batches,
        loss,
    )
    if targets == "all-linear":
        made.left_out = left_out(model, list(made.deltas), made.attached.trained)
    return made


def _structure(given: object, options: dict[str, Any]) -> Structure:
    """The structure that was asked for. Raises InputError with the nearest way to ask."""
    for word, ours in WORDS.items():
        if word in options:
            here = ours if ours.startswith("not needed") else f"called {ours} here"
            raise InputError(f"PEFT's {word}= is {here}")
    if isinstance(given, str):
        kind = STRUCTURE.find(given)
        kind.check_options(options)
        return make(given, **options)
    if isinstance(given, type) and issubclass(given, Structure):
        raise InputError(f"{given.__name__} is a class; pass one of it: fs.{given.__name__}()")
    if hasattr(given, "peft_type"):
        kind_name = str(getattr(given.peft_type, "value", given.peft_type)).lower()
        raise InputError(
            f"{type(given).__name__} is PEFT's; ask fs.adapt(model, {kind_name!r}, "
            "rank=..., alpha=..., targets=...)"
        )
    if not isinstance(given, Structure):
        raise InputError(f"structure={given!r} must be a name or an instance: 'lsr', fs.LSR()")
    for option in options:
        ours = type(given).aliases.get(option, option)
        given.check_options([ours])
        raise InputError(
            f"{option}= belongs to the structure: fs.{type(given).__name__}({ours}=...)"
        )
    return given


def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    force: bool = False,
    trainable: bool = False,
    strict: bool = True,
    part: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
) -> Adapter:
    """Load an adapter that Finespun, PEFT, diffusers or kohya's scripts wrote, and activate it.

    `folder` is a folder, a file, or "owner/name" on the Hugging Face Hub, where huggingface_hub is
    installed: then `revision` is a branch, tag or commit, and `token` opens what is private (else
    the stored one); only JSON and safetensors are fetched, and without a network the cache
    answers. `subfolder` lies inside either. `name` replaces the name it was saved under;
    `trainable` lets it be trained further, else its parameters are frozen. `force` loads on another
    base, `strict=False` passes over unknown keys; both warn of what they passed over. `part` says
    which part of a pipeline the model is ("unet", "text_encoder", ...) where a file holds several
    that fit it.

    Raises FileError, BaseMismatch, TargetError or PlanError naming every file, key or site that is
    wrong, and leaves the model untouched.
    """
    hosts.check_model(model)
    if is_repository(folder):
        place = download(str(folder), revision, subfolder, token)
    else:
        if revision is not None or token is not None:
            raise InputError(
                f"revision= and token= are for 'owner/name' on the Hub; {str(folder)!r} is a "
                "path that exists, or no such name"
            )
        place = Path(folder) / (subfolder or "")
    return holder.load(model, place, name, force, trainable, strict, part)


@dataclass(frozen=True)
class Listed:
    """One adapter of a model: what it is, how strongly it acts now (None: it rests), whether it is
    merged into the weights and whether its parameters are trained."""

    name: str
    structure: Structure
    sites: int
    weight: float | None
    merged: bool
    trained: bool


def list_adapters(model: nn.Module) -> list[Listed]:
    """Every adapter of the model, in the order in which they came; none where it has none. Looking
    creates no modules."""
    hosts.check_model(model)
    if "_finespun_adapters" not in model.__dict__:
        return []
    adapter_set = hosts.adapter_set_of(model)
    weights, found = dict(adapter_set.active), []
    for name in adapter_set.states:
        held, live = adapter_set[name], adapter_set.attached.get(name)
        trained = live is not None and any(p.requires_grad for p in live.parameters())
        found.append(
            Listed(
                name,
                held.structure,
                len(held.plan.sites),
                weights[name] * held.strength if name in weights else None,
                name in adapter_set.merged,
                trained,
            )
        )
    return found


def make_trainable(model: nn.Module, names: str | Sequence[str]) -> list[Adapter]:
    """Let several adapters train at once, and nothing else of the model; they act together.

    All of them are active afterwards, with weight 1; `fs.activate` chooses other weights, `fs.rows`
    one for each row. Returns them; an optimiser takes the `parameters()` of each. Raises
    InputError for an unknown name, StateError while adapters are merged; nothing has changed then.
    """
    wanted = list(dict.fromkeys([names] if isinstance(names, str) else names))
    adapters = [Adapter(model, name) for name in wanted]
    if not adapters:
        raise InputError("name at least one adapter to train")
    adapter_set = hosts.adapter_set_of(model)
    for adapter in adapters:
        hosts.check(adapter_set, "train", adapter.name)
    hosts.activate(model, wanted)
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    for adapter in adapters:
        hosts.own_buffers(model, adapter.name)
        hosts.freeze_others(model, adapter.name, parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return adapters


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter out of the model, or all of them; after the last one the model is what it
    was. Raises InputError for an unknown name, StateError while it is merged or serves rows."""
    hosts.check_model(model)
    if name is not None:
        hosts.detach(model, name)
        return
    listed = [found.name for found in list_adapters(model)]
    for each in listed:
        hosts.check(hosts.adapter_set_of(model), "detach", each)
    for each in listed:
        hosts.detach(model, each)
