"""Taking the fingerprint of a base model, and knowing it again in another dtype or quantised.

It holds the class, the names and shapes of all parameters as one hash, and 32 values each of at
most twelve tensors. Quantisers round matrices and leave vectors (norms, biases) alone; training
moves both: so vectors must agree to the precision of the dtype, matrices to a fifth.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finespun.adapters.fingerprint import Fingerprint
from finespun.errors import BaseMismatch
from finespun.hosts.adapter_set import adapter_set_of
from finespun.hosts.layers.layer import plain_class
from finespun.hosts.layers.quantised import dequantise, quantised
from finespun.hosts.merging import disabled
from finespun.hosts.states import check
from finespun.hosts.targets import modules

MATRICES, VECTORS, VALUES = 8, 4, 32
QUANTISED = 0.2  # relative error: 4 bits give about 0.1, another model about 1.4
_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: positions spread evenly

Shapes = dict[str, tuple[int, ...]]


class Survey(NamedTuple):
    """Shapes of all parameters by name, and how to read those whose values are there; a quantised
    one is made floats only when it is read."""

    shapes: Shapes
    readable: dict[str, Callable[[], Tensor]]


def fingerprint(model: nn.Module, left_out: Sequence[str] = ()) -> Fingerprint:
    """The base's own fingerprint, the same before and after adapting or merging.

    `left_out` are modules that the adapter replaces (its head). Raises StateError where a merge
    did not keep the original weights.
    """
    with _base(model):
        return _take(model, left_out, _survey(model, left_out))


def check_base(saved: Fingerprint, model: nn.Module, force: bool = False) -> list[str]:
    """Notes on how this model differs from the base an adapter was made for.

    Raises BaseMismatch, naming both, when it is another base; `force` makes that a note.
    """
    notes: list[str] = []
    with _base(model):
        survey = _survey(model, saved.left_out)
        if saved.shapes == _digest(survey.shapes):
            problem, notes = _compare_values(saved, survey)
        else:
            problem = _compare_shapes(saved, survey.shapes)
        if problem is not None:
            here = _take(model, saved.left_out, survey)
    if problem is None:
        return notes
    told = f"the adapter was made for {saved}, this model is {here}: {problem}"
    if not force:
        raise BaseMismatch(f"{told}; force=True loads it all the same")
    return [told]


def _take(model: nn.Module, left_out: Sequence[str], survey: Survey) -> Fingerprint:
    return Fingerprint(
        architecture=plain_class(model).__name__,
        source=_source(model),
        numbers=_count(survey.shapes),
        shapes=_digest(survey.shapes),
        left_out=tuple(left_out),
        samples={n: _sample(survey.readable[n]()) for n in _choose(survey)},
    )


def _compare_shapes(saved: Fingerprint, shapes: Shapes) -> str:
    if saved.numbers != _count(shapes):
        return f"{saved.numbers:,} parameters there, {_count(shapes):,} here"
    return "names or shapes of parameters differ"


def _digest(shapes: Shapes) -> str:
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def _count(shapes: Shapes) -> int:
    return sum(math.prod(s) for s in shapes.values())


def _compare_values(saved: Fingerprint, survey: Survey) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    rounded, compared = 0.0, dict[str, str]()
    for name, (dtype, values) in saved.samples.items():
        if name not in survey.readable:
            continue
        now, here = _sample(survey.readable[name]())
        if len(here) != len(values):
            continue
        compared[name] = now
        error = _distance(values, here)
        eps = max(torch.finfo(getattr(torch, d)).eps for d in (dtype, now))
        if error > 2 * eps:
            if len(survey.shapes[name]) < 2 or error > QUANTISED:
                return f"{name!r} differs by {error:.0%} of its size", notes
            rounded = max(rounded, error)
    if not compared:
        return None, ["no sampled weight of the base could be compared: its values are not known"]
    if len(compared) < len(saved.samples):
        missing = len(saved.samples) - len(compared)
        notes.append(f"{missing} of {len(saved.samples)} sampled tensors cannot be read here")
    if rounded:
        notes.append(
            f"the base's weights differ by up to {rounded:.1%} from those the adapter was made "
            "for, as in a quantised copy"
        )
    before = sorted({dtype for dtype, _ in saved.samples.values()})
    if before != (after := sorted(set(compared.values()))):
        notes.append(f"the base is {', '.join(after)} here and was {', '.join(before)}")
    return None, notes


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """‖a − b‖ / ‖a‖, less what half precision loses of the smallest parameters."""
    norm = math.hypot(*a)
    difference = math.dist(a, b) - 1e-7 * math.sqrt(len(a))
    if not difference > 0:
        return math.inf if math.isnan(difference) else 0.0
    return difference / norm if norm else math.inf


def _survey(model: nn.Module, left_out: Sequence[str]) -> Survey:
    """A quantised layer counts with the shapes of its plain one."""
    found = Survey({}, {})
    for place, module in [("", model), *modules(model).items()]:
        if any(place == n or place.startswith(n + ".") for n in left_out):
            continue
        out, size = (getattr(module, n, None) for n in ("out_features", "in_features"))
        if isinstance(out, int) and isinstance(size, int):
            found.shapes[_join(place, "weight")] = (out, size)
            if getattr(module, "bias", None) is not None:
                found.shapes[_join(place, "bias")] = (out,)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = _join(place, name)
            found.shapes.setdefault(full, tuple(parameter.shape))
            if parameter.is_meta or not parameter.numel():
                continue
            if name == "weight" and quantised(module):
                found.readable[full] = partial(dequantise, module, parameter)
            elif parameter.is_floating_point():
                found.readable[full] = parameter.detach
    return found


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _choose(survey: Survey) -> list[str]:
    """Eight matrices and four vectors, evenly spread over the sorted names."""
    names = sorted(survey.readable)
    matrices = [n for n in names if len(survey.shapes[n]) > 1]
    vectors = [n for n in names if len(survey.shapes[n]) < 2]
    return _spread(matrices, MATRICES) + _spread(vectors, VECTORS)


def _spread(names: list[str], count: int) -> list[str]:
    last = len(names) - 1
    return sorted({names[i * last // (count - 1)] for i in range(count)}) if names else []


def _sample(parameter: Tensor) -> tuple[str, tuple[float, ...]]:
    """The dtype's name and the values."""
    size = parameter.numel()
    if size <= VALUES:
        at = list(range(size))
    else:
        at = [((i * _STRIDE) % 2**64 * size) >> 64 for i in range(1, VALUES + 1)]
    flat = parameter.detach().reshape(-1)[torch.tensor(at, device=parameter.device)]
    return _name(parameter.dtype), tuple(float(f"{v:.9g}") for v in flat.float().tolist())


def _base(model: nn.Module) -> Any:
    """A context in which the model's own parameters are those of its base."""
    if "_finespun_adapters" not in model.__dict__:
        return nullcontext()
    adapter_set = adapter_set_of(model)
    check(adapter_set, "fingerprint")
    return disabled(model) if adapter_set.merged else nullcontext()


def _source(model: nn.Module) -> str:
    """The hub name that a transformers model was loaded from; of a local folder the last part."""
    source = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    path = PurePath(source)
    return path.name if path.is_absolute() or source.startswith((".", "~")) else source


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
