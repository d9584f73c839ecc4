"""What the updates of an adapter are like, and how two adapters differ; from files, layer by layer.

Only r x r cores are decomposed; no ΔW is ever held where it has factors.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finespun import files
from finespun.adapters.deltas import Deltas, update_of
from finespun.errors import InputError
from finespun.files import Saved
from finespun.lifecycle.stored import StoredWeights, deltas_of
from finespun.linalg import LowRank

TOP = 4
SMALL = 1e-6  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Spectrum:
    """One site's ΔW: ‖ΔW‖_F, its numerical rank, its effective rank exp(−Σ p_i ln p_i) with
    p_i = σ_i² / Σ σ², the largest singular values, and what the structure says of its own health
    (LSR's condition κ, say)."""

    name: str
    shape: tuple[int, int]
    norm: float
    rank: int
    effective_rank: float
    top: tuple[float, ...]
    health: Mapping[str, float]


@dataclass(frozen=True)
class Difference:
    """One site of two adapters a and b.

    `cosine` is ⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖); `distance` is ‖ΔW_a − ΔW_b‖ / ‖ΔW_a‖; `inputs` and
    `outputs` are the overlap ‖P_a P_b‖² / min(r_a, r_b) of row and column spaces, 1 where the
    smaller lies in the larger. NaN where an update is zero.
    """

    name: str
    norm_a: float
    norm_b: float
    cosine: float
    distance: float
    inputs: float
    outputs: float


@dataclass(frozen=True)
class Comparison:
    """Two adapters: what differs at the sites they share, sites that one of them lacks, and cosine
    and distance of all updates taken together."""

    sites: tuple[Difference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    cosine: float
    distance: float


def spectra(saved: Saved, model: str | Path | None = None) -> Iterator[Spectrum]:
    """Every site's spectrum. Raises InputError where an update needs the base and no `model` folder
    is named."""
    base = None if model is None else StoredWeights(model)
    for name, delta in deltas_of(saved.state, base).items():
        update = update_of(delta, saved.state.strength)
        values = update.singular_values().double()
        size = float(torch.linalg.vector_norm(values))
        health = {k: v for k, v in delta.diagnostics().items() if math.isfinite(v)}
        top = tuple(values[:TOP].tolist())
        yield Spectrum(name, update.shape, size, _rank(values), _effective(values), top, health)


def compare(
    a: str | Path, b: str | Path, model: str | Path | None = None, strict: bool = True
) -> Comparison:
    """Compare the adapters in two folders, each Finespun's or PEFT's, strength included.

    `model` names the base's folder where updates depend on its weights or sizes. Raises FileError
    for what cannot be read, InputError where a shared site has two shapes.
    """
    base = None if model is None else StoredWeights(model)
    layers = None if base is None else base.sites
    with files.offering_lenience(strict):
        first, second = (files.read_adapter(folder, strict, layers) for folder in (a, b))
    mine, theirs = deltas_of(first.state, base), deltas_of(second.state, base)
    shared = [name for name in mine if name in theirs]
    found, inner, sizes = [], 0.0, [0.0, 0.0]
    for name in shared:
        if mine.sites[name] != theirs.sites[name]:
            raise InputError(
                f"{name!r} differs in shape: {mine.sites[name]} and {theirs.sites[name]}"
            )
        x, y = (
            update_of(mine[name], first.state.strength),
            update_of(theirs[name], second.state.strength),
        )
        found.append(difference(name, x, y))
        inner += float(_double(x).inner(_double(y)))
        sizes = [sizes[0] + found[-1].norm_a ** 2, sizes[1] + found[-1].norm_b ** 2]
    sizes[0] += _alone(mine, theirs, first.state.strength)
    sizes[1] += _alone(theirs, mine, second.state.strength)
    apart = math.sqrt(max(0.0, sizes[0] + sizes[1] - 2 * inner))
    return Comparison(
        tuple(found),
        tuple(n for n in mine if n not in theirs),
        tuple(n for n in theirs if n not in mine),
        _share(inner, math.sqrt(sizes[0] * sizes[1])),
        _share(apart, math.sqrt(sizes[0])),
    )


def difference(name: str, a: LowRank, b: LowRank) -> Difference:
    """How the updates a and b of one site differ."""
    a, b = _double(a), _double(b)
    sizes = float(a.norm()), float(b.norm())
    left, right = a.svd(), b.svd()
    r, s = _rank(left.S), _rank(right.S)
    least = float(min(r, s))
    outputs = torch.linalg.matrix_norm(left.U[:, :r].mT @ right.U[:, :s]).square()
    inputs = torch.linalg.matrix_norm(left.Vh[:r] @ right.Vh[:s].mT).square()
    return Difference(
        name,
        *sizes,
        _share(float(a.inner(b)), sizes[0] * sizes[1]),
        _share(float((a - b).norm()), sizes[0]),
        _share(float(inputs), least),
        _share(float(outputs), least),
    )


def _alone(here: Deltas, other: Deltas, strength: float) -> float:
    """Σ ‖ΔW‖² over the sites that the other lacks."""
    return sum(float(update_of(here[n], strength).norm()) ** 2 for n in here if n not in other)


def _double(update: LowRank) -> LowRank:
    return LowRank(update.A.double(), update.B.double())


def _rank(values: Tensor) -> int:
    return 0 if not len(values) else int((values > SMALL * values[0]).sum())


def _effective(values: Tensor) -> float:
    energy = values.square()
    if not float(energy.sum()):
        return 0.0
    shares = energy / energy.sum()
    return math.exp(float(torch.special.entr(shares).sum()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
