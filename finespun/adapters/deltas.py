"""The deltas of an adapter, one at a time and without a model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finespun.adapters.keys import Key, by_place, held_by, started
from finespun.adapters.state import AdapterState
from finespun.contract import Bank, Delta, Site, SiteShape
from finespun.contract.mixing import mount
from finespun.errors import FileError, InputError
from finespun.linalg import LowRank
from finespun.storage.blame import DAMAGED, finite_number
from finespun.storage.memory_limit import bounded

LARGEST = 3.4e38  # a number in float32
LARGEST_NORM = 1e18  # whose square float32 can still hold
Sites = Callable[[SiteShape], Site]


@dataclass(frozen=True)
class BareSite:
    """A site that is known by its shape alone, in float32 on the CPU."""

    shape: SiteShape
    coupling: None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def weight(self) -> Tensor:
        """Raises InputError: the weight lies in a model."""
        raise InputError(
            f"the update of {self.shape.name!r} depends on the base weight: give the sites of the "
            "base (sites=...)"
        )

    def bias(self) -> Tensor | None:
        """As `weight`."""
        return self.weight()


class Deltas(Mapping[str, Delta]):
    """Site name -> delta with a copy of its tensors, built anew whenever it is asked for.

    `sites` gives the site of a shape: that of a model or of a folder of weights where updates
    depend on the base. Raises FileError naming what the tensors lack or have too much, InputError
    where an update needs the base and has none.
    """

    def __init__(self, state: AdapterState, sites: Sites = BareSite) -> None:
        self.state, self.site_of = state, sites
        self.sites = {site.name: site for site in state.plan.sites}
        self.starts, self.own = started(state.tensors), by_place(state.tensors, "site")
        places = {("site", name) for name in self.sites} | {("bank", "")}
        places |= {("module", name) for name in state.trained}
        for key in state.tensors:
            if (key.owner, key.place) not in places and key.role != "buffer":
                raise FileError(f"{key!r} belongs to nothing that the plan names")
        with blamed("the bank"):
            self.bank = state.structure.bank(state.plan)
        if self.bank is not None:
            if ("bank", "") in self.starts:
                self.bank.keep_start()
            _fill(self.bank, held_by("bank", "", state.tensors), Key("bank", "", ""))

    def __getitem__(self, name: str) -> Delta:
        site = self.site_of(self.sites[name])
        with blamed(repr(name)):
            plan = self.state.plan
            delta = mount(self.state.structure.build(site, plan, self.bank), plan.choices[name])
            check_scale(name, delta.scale)
        if self.starts & {("bank", ""), ("site", name)}:
            delta.keep_start()
        _fill(delta, self.own.get(name, {}), Key("site", name, ""))
        return delta.requires_grad_(False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


@torch.no_grad()
def update_of(
    delta: Delta, strength: float = 1.0, rank: int | None = None, energy: float | None = None
) -> LowRank:
    """ΔW of one site, strength included. Raises InputError where there is more to it than ΔW: a
    moved bias, or a bypass around a block."""
    name = delta.site.shape.name
    if not delta.mergeable:
        raise InputError(f"{name!r} is adapted around a block, not in a weight: nothing to convert")
    moved = delta.bias_change() if "map_bias" in delta.written else None
    if moved is not None and bool(moved.any()):
        raise InputError(f"the adapter moves the bias of {name!r}, which the result cannot say")
    with blamed(repr(name)):
        found = delta.as_low_rank(rank, energy) * strength
    exact = LowRank(found.A.double(), found.B.double())
    sizes = (exact.A.norm(), exact.B.norm(), exact.norm())
    if not all(float(size) < LARGEST_NORM for size in sizes):
        raise FileError(f"{name!r}: the update is so large that sums of its squares overflow")
    return found


def check_scale(name: str, scale: Any) -> None:
    """Raise FileError unless the scale that a plan gave a site's update is one that float32 has."""
    if abs(finite_number(scale, f"the scale of {name!r}")) > LARGEST:
        raise FileError(f"the scale of {name!r} is {scale}, larger than any number in float32")


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Name the site in what goes wrong; what a damaged plan leads to becomes a FileError."""
    try:
        with bounded(what):
            yield
    except FileError:
        raise
    except InputError as error:
        if what in str(error):
            raise
        raise InputError(f"{what}: {error}") from error
    except (*DAMAGED, MemoryError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise FileError(f"{what}: its plan or its parameters are damaged ({reason})") from error


def _fill(module: Bank | Delta, own: Mapping[str, Tensor], place: Key) -> None:
    """Copy a module's own tensors into it; errors name the key that is missing."""
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        lacking = sorted(module.state_dict().keys() - own.keys())
        if lacking:
            missing = Key.of(place.owner, place.place, lacking[0])
            reason = f"{missing!r} is missing; {reason}"
        raise FileError(f"{str(place).rstrip('/')!r}: {reason}") from error
