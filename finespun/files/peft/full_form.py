"""What PEFT's files say beside A and B, and the portable profile leaves out.

DoRA's magnitudes, embeddings, convolutions, biases, trained rows of tables: PEFT alone reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from finespun.contract import Delta
from finespun.contract.structure import TIE
from finespun.errors import InputError
from finespun.files.peft.keys import keys_of
from finespun.hosts import Attached, modules
from finespun.hosts.layers.slices import SliceHost
from finespun.linalg import LowRank


@dataclass
class FullForm:
    """How each layer's factors are written (`kinds`, and a convolution's weight in `shapes`), the
    tensors beside them by their names in PEFT's model, and what the config says of them."""

    kinds: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Size] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def factors(self, path: str, update: LowRank, rank: int) -> dict[str, Tensor]:
        """A and B by their keys, as wide as `rank`, zeros filling up."""
        empty = rank - update.rank
        A, B = F.pad(update.A.float(), (0, 0, 0, empty)), F.pad(update.B.float(), (0, empty))
        if path in self.shapes:
            kernel = self.shapes[path][1:]
            A, B = A.view(-1, *kernel), B.view(*B.shape, *[1] * (len(kernel) - 1))
        a, b = keys_of(path, self.kinds.get(path, "linear"))
        return {a: A, b: B}


def full_form(model: nn.Module, adapter: Attached, name_of: Callable[[str], str]) -> FullForm:
    """The form for PEFT alone; `name_of` gives the name by which PEFT finds one module and no
    other. Raises InputError for what PEFT's format cannot say."""
    known, form = modules(model), FullForm()
    rows: dict[str, list[int]] = {}
    moved: dict[str, Tensor] = {}
    for name, delta in adapter.deltas.items():
        beside = delta.written_beside()
        if beside is not None and beside.rows is not None and beside.own is not None:
            rows[name] = list(beside.tokens)
            form.tensors[f"{name}.token_adapter.trainable_tokens_delta"] = (
                beside.own + adapter.strength * (beside.rows - beside.own)
            )
            continue
        form.kinds[name] = delta.site.shape.kind
        weight = known[name.partition(":")[0]]._parameters.get("weight")
        if form.kinds[name] == "conv" and weight is not None:
            form.shapes[name] = weight.shape
        if beside is not None and beside.magnitude is not None:
            lengths = _lengths(name, delta, beside.magnitude, adapter, form)
            form.tensors[f"{name}.lora_magnitude_vector"] = lengths
            form.config["use_dora"] = True
        change = delta.bias_change()
        alone = beside is not None and beside.factors is None
        if change is not None and (alone or bool(change.any())):
            moved[name] = _bias(name, delta, adapter.strength * change.detach())
    if moved:
        _biases(model, adapter, moved, form)
    if rows:
        _tokens(adapter, rows, form, name_of)
    form.config["lora_dropout"] = adapter.structure.dropout
    return form


def _lengths(name: str, delta: Delta, m: Tensor, adapter: Attached, form: FullForm) -> Tensor:
    if adapter.strength != 1.0 or delta.adjusted:
        raise InputError(
            f"{name!r} is a DoRA of strength {adapter.strength}: PEFT's file holds it at strength "
            "1, without gates or an exact start; set adapter.scale = 1.0, or leave portable=True"
        )
    dims = len(form.shapes.get(name, ())) - 2
    return m.view(1, -1, *[1] * dims) if name in form.shapes else m


def _bias(name: str, delta: Delta, change: Tensor) -> Tensor:
    b0 = delta.site.bias()
    if b0 is None or isinstance(delta.site, SliceHost):
        raise InputError(f"the bias of {name!r} is a slice of a layer's, which PEFT cannot say")
    return b0.detach().float() + change


def check_tied(adapter: Attached, portable: bool) -> None:
    """Raise InputError where one update acts at two uses of a weight, which a file says only of
    trained rows of a table."""
    for other, name in adapter.plan.shared.get(TIE, {}).items():
        beside = adapter.deltas[name].written_beside()
        if portable or beside is None or beside.rows is None:
            raise InputError(
                f"{name!r} acts at {other!r} too, which shares its weight; PEFT's file says one"
            )


def _biases(model: nn.Module, adapter: Attached, moved: dict[str, Tensor], form: FullForm) -> None:
    """bias="lora_only" where nothing but biases beside a LoRA moved, else every bias of the model,
    among them those of norms, which are then no modules of their own."""
    besides = {n: d.written_beside() for n, d in adapter.deltas.items()}
    pairs = [n for n, b in besides.items() if b is None or b.factors is not None]
    here = {n: adapter.deltas[n].site.bias() for n in pairs}
    if moved.keys() <= {n for n, b in here.items() if b is not None}:
        form.config["bias"] = "lora_only"
        for name, own in here.items():
            if own is not None:
                form.tensors[f"{name}.base_layer.bias"] = moved.get(name, own)
        return
    form.config["bias"] = "all"
    known = {"": model, **modules(model)}
    form.dropped = tuple(
        n for n in adapter.trained if _only_bias_moved(known[n], adapter.copies[n])
    )
    kept = [n for n in adapter.trained if n not in form.dropped]
    for name, module in known.items():
        own = module._parameters.get("bias")
        if own is None:
            continue
        whole = [t for t in kept if name == t or name.startswith(f"{t}.")]
        if whole:
            rest = f"{name}.bias".removeprefix(f"{whole[0]}.")
            form.tensors[f"{whole[0]}.original_module.{rest}"] = own.detach()
            copied = adapter.copies[whole[0]].state_dict()[rest]
            form.tensors[f"{whole[0]}.modules_to_save.{rest}"] = copied
            continue
        value = moved.get(name, own.detach())
        if name in form.dropped:
            value = adapter.copies[name].state_dict()["bias"]
        inner = "base_layer." if name in pairs else ""
        form.tensors[f"{name}.{inner}bias".removeprefix(".")] = value


def _only_bias_moved(module: nn.Module, copy: nn.Module) -> bool:
    own, theirs = module._parameters, copy._parameters
    return (
        not copy._modules
        and theirs.get("bias") is not None
        and all(
            p is None or n == "bias" or torch.equal(p, q)
            for n, p in own.items()
            if (q := theirs.get(n)) is not None
        )
    )


def _tokens(
    adapter: Attached, rows: dict[str, list[int]], form: FullForm, name_of: Callable[[str], str]
) -> None:
    if len(rows) < len(adapter.deltas):
        form.config["trainable_token_indices"] = {name_of(n): rows[n] for n in rows}
        return
    first = next(iter(rows.values()))
    if any(tokens != first for tokens in rows.values()):
        raise InputError("PEFT trains the same tokens of every table where there is no LoRA beside")
    form.config["token_indices"] = first
    form.tensors = {k.replace(".token_adapter.", "."): v for k, v in form.tensors.items()}
