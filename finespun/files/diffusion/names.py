"""Names of layers in files of diffusers and kohya, and the layers of a model that they mean.

kohya writes underscores for dots, so that a name is only known again beside the model's own; for
SDXL it trains the UNet of the first implementation, whose blocks are numbered in one row. Text
encoders have their layers under `text_model.`, or not, as transformers' version decides.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from finespun.adapters.keys import Key, by_place, of_site
from finespun.contract import Plan, SiteShape
from finespun.errors import InputError, PlanError, TargetError, nearest
from finespun.files.saved import Saved
from finespun.hosts import modules, sites
from finespun.hosts.layers.host import Host
from finespun.methods.structures.lora import LoRA

Style = Literal["kohya", "diffusers"]
KOHYA = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}
PIPELINE_PARTS = (*KOHYA, "transformer_2")
SHOWN = 5
_KOHYA = re.compile(r"(lora_(?:unet|transformer|te[123]?))_(\w+)")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)(?:\.(.+))?")
_WHOLE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


class Layer(NamedTuple):
    """A layer of a model: its site, and (in, k, ...) where it is a convolution."""

    shape: SiteShape
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class Unplaced(Saved):
    """An adapter whose sites have the names of its file. `where` names the part of the pipeline and
    the path in it (for kohya with underscores); `kernels` the (in, k, ...) of convolutions."""

    style: Style = "diffusers"
    where: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """The parts of the pipeline that the file names, in its order."""
        return list(dict.fromkeys(part for part, _ in self.where.values()))


def split_kohya(name: str) -> tuple[str, str] | None:
    """Part and path of a name in kohya's spelling, None for any other."""
    found = _KOHYA.fullmatch(name)
    if found is None:
        return None
    prefix = "lora_te" if found[1] == "lora_te1" else found[1]
    return next(part for part, mark in KOHYA.items() if mark == prefix), found[2]


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Every layer of a model that can be adapted, by name."""
    known = modules(model)
    weights = {n: m._parameters.get("weight") for n, m in known.items()}
    names = [n for n, w in weights.items() if w is not None and w.dim() > 1]
    try:
        hosts = sites(model, names, LoRA())
    except TargetError:
        hosts = {n: h for n in names for h in _site(model, n)}
    return {
        name: Layer(h.shape, tuple(h.layer.weight.shape[1:]) if h.kind == "conv" else ())
        for name, h in hosts.items()
    }


def _site(model: nn.Module, name: str) -> list[Host]:
    try:
        return list(sites(model, [name], LoRA()).values())
    except TargetError:
        return []


def place_on(saved: Saved, layers: Mapping[str, Layer], part: str | None = None) -> Saved:
    """The adapter with the names that `layers` (a model's) have. Of a file for several parts of a
    pipeline that part is taken which fits, or the one named; the rest is named in a note.

    Raises TargetError naming what the model lacks and the nearest there is, PlanError for another
    size, InputError where two parts fit or `part` is not in the file.
    """
    if not isinstance(saved, Unplaced):
        if part is not None:
            raise InputError(f"{saved.state.name!r} has no parts such as {part!r}: leave part out")
        return saved
    _check_part(saved, part)
    found = {p: _resolve(saved, p, layers) for p in ([part] if part is not None else saved.parts)}
    fits = [p for p, f in found.items() if not f.missing + f.sized]
    own = [p for p in fits if any(name.startswith(f"{p}.") for name in layers)]
    if len(fits) > 1 and len(own) < len(fits):
        raise InputError(f"{' and '.join(fits)} fit this model; say which, as part={fits[0]!r}")
    if not fits:
        best = max(found.values(), key=lambda f: len(f.names))
        problems = best.missing + best.sized
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise (TargetError if best.missing else PlanError)("; ".join(problems[:SHOWN]) + more)
    names = {raw: name for p in fits for raw, name in found[p].names.items()}
    left = [] if part is not None else [p for p in saved.parts if p not in fits]
    notes = [f"of {p!r} nothing was taken: it is another part of the pipeline" for p in left]
    return _renamed(saved, names, layers, notes)


def stripped(saved: Saved, part: str | None = None) -> Saved:
    """The adapter with the paths in diffusers' file as names, where there is no model to ask.

    Raises InputError for kohya's names and for several parts of which none is named.
    """
    if not isinstance(saved, Unplaced):
        return place_on(saved, {}, part)
    _check_part(saved, part)
    if saved.style == "kohya":
        raise InputError(
            "kohya's names write underscores for dots, which only the model's own names undo: name "
            "the folder of the part that was trained (model=..., on the command line --model)"
        )
    if part is None and len(saved.parts) > 1:
        raise InputError(f"the file names {', '.join(saved.parts)}; say which, as part=...")
    names = {raw: path for raw, (own, path) in saved.where.items() if part in (None, own)}
    return _renamed(saved, names, {}, [])


class _Found(NamedTuple):
    """Name in the file -> name in the model; what the model lacks, or has in another size."""

    names: dict[str, str]
    missing: list[str]
    sized: list[str]


def _check_part(saved: Unplaced, part: str | None) -> None:
    if part is not None and part not in saved.parts:
        raise InputError(f"the file has no part {part!r}; {nearest(part, saved.parts)}")


def _resolve(saved: Unplaced, part: str, layers: Mapping[str, Layer]) -> _Found:
    below = {n.removeprefix(f"{part}."): n for n in layers if part and n.startswith(f"{part}.")}
    own = below or {n: n for n in layers}
    known: dict[str, list[str]] = defaultdict(list)
    for short, spellings in _spellings(own).items():
        for s in spellings:
            known[s.replace(".", "_") if saved.style == "kohya" else s].append(own[short])
    found, taken = _Found({}, [], []), dict[str, str]()
    for site in saved.state.plan.sites:
        where, path = saved.where[site.name]
        if where != part:
            continue
        there = known.get(path, [])
        right = [n for n in there if _size(layers[n].shape) == _size(site)]
        if len(right) > 1:
            found.missing.append(f"{site.name!r} may mean {' or '.join(map(repr, right))}")
        elif right and right[0] in taken:
            found.missing.append(f"{site.name!r} and {taken[right[0]]!r} both mean {right[0]!r}")
        elif right:
            found.names[site.name] = right[0]
            taken[right[0]] = site.name
        elif there:
            sizes = "{}x{}, the model's {!r} {}x{}".format(
                *_size(site), there[0], *_size(layers[there[0]].shape)
            )
            found.sized.append(f"{site.name!r} is {sizes}")
        else:
            told = nearest(path, known)
            found.missing.append(f"{site.name!r} is no layer of this model; {told}")
    return found


def _size(shape: SiteShape) -> tuple[int, int]:
    return shape.out_features, shape.in_features


def _renamed(
    saved: Unplaced, names: Mapping[str, str], layers: Mapping[str, Layer], notes: list[str]
) -> Saved:
    """The sites in `names` alone, under their new names and of the model's kind of layer."""
    old = saved.state
    shapes = []
    for site in old.plan.sites:
        if site.name in names:
            name = names[site.name]
            kind = layers[name].shape.kind if name in layers else site.kind
            shapes.append(dataclasses.replace(site, name=name, kind=kind))
    choices = {names[n]: dict(c) for n, c in old.plan.choices.items() if n in names}
    tensors: dict[Key, Tensor] = {}
    for raw, own in by_place(old.tensors, "site").items():
        if raw in names:
            tensors |= of_site(names[raw], own)
    state = old.with_tensors(tensors, Plan(tuple(shapes), choices))
    return Saved(state, saved.sha256, (*saved.notes, *notes))


# --- spellings ------------------------------------------------------------------------------
def _spellings(names: Iterable[str]) -> dict[str, set[str]]:
    """Every way to write each name, dots still dots."""
    found = {name: {name, *_with_text_model(name)} for name in names}
    for name, first in _first_names(found).items():
        found[name].add(first)
    return found


def _with_text_model(name: str) -> list[str]:
    if name.startswith("text_model."):
        return [name.removeprefix("text_model.")]
    return [f"text_model.{name}"] if name.startswith(("encoder.", "embeddings.")) else []


def _first_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name of a UNet's layer -> that of the first implementation: blocks in one row,
    a down block's sampler a place of its own, an up block's in the place of its last resnet."""
    blocks = {name: m for name in names if (m := _BLOCK.fullmatch(name))}
    depth: dict[tuple[str, int], int] = defaultdict(int)
    has = {(m[1], int(m[2]), m[3]) for m in blocks.values()}
    for m in blocks.values():
        if m[3] == "resnets":
            block = m[1], int(m[2])
            depth[block] = max(depth[block], int(m[4]) + 1)
    starts: dict[tuple[str, int], int] = {}
    row = {"down": 1, "up": 0}
    for side, i in sorted(depth):
        starts[side, i] = row[side]
        row[side] += depth[side, i] + ((side, i, "downsamplers") in has)
    found = {name: _WHOLE[name] for name in names if name in _WHOLE}
    for name in names:
        if name.startswith("mid_block."):
            kind, number, inner = (*name.split(".", 3), "", "")[1:4]
            if f"{kind}.{number}" in _MIDDLE:
                place = _MIDDLE[f"{kind}.{number}"]
                found[name] = f"middle_block.{place}.{_inner(kind, inner)}"
    for name, m in blocks.items():
        side, i, kind, j, inner = m[1], int(m[2]), m[3], int(m[4]), m[5] or ""
        if (side, i) not in starts:
            continue
        start, end = starts[side, i], starts[side, i] + depth[side, i]
        rows = "input_blocks" if side == "down" else "output_blocks"
        if kind in ("resnets", "attentions"):
            column = int(kind == "attentions")
            found[name] = f"{rows}.{start + j}.{column}.{_inner(kind, inner)}"
        elif side == "down":
            found[name] = f"input_blocks.{end}.0.op"
        else:
            column = 1 + ((side, i, "attentions") in has)
            found[name] = f"output_blocks.{end - 1}.{column}.conv"
    return found


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest
