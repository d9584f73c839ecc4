"""What is taken from a folder into an adapter that is there: parameters of the same form, or what a
start reads, another adapter's updates or weights before quantisation."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from finespun.adapters.deltas import Deltas, update_of
from finespun.adapters.state import AdapterState
from finespun.contract import Initializer, Need, Structure
from finespun.errors import FileError, InputError, nearest
from finespun.files.check_fit import settle
from finespun.files.detect import read_for
from finespun.hosts import adapter_set_of, check, check_base, materialise, sites
from finespun.linalg import LowRank
from finespun.storage.safe_io import read_tensors


def alike(
    model: nn.Module, name: str, folder: str | Path, force: bool, strict: bool
) -> AdapterState:
    """The adapter in a folder, of the form of adapter `name` of `model`. Raises InputError where
    the two differ in form, BaseMismatch for another base unless `force`, StateError while `name` is
    merged."""
    saved = read_for(model, folder, strict)
    check(adapter_set_of(model), "swap", name)
    theirs, mine = settle(model, saved.state), materialise(model, name)
    if theirs.base is not None:
        check_base(theirs.base, model, force)
    made = theirs.structure.kind, theirs.plan, theirs.trained
    if made != (mine.structure.kind, mine.plan, mine.trained):
        raise InputError(
            f"{folder} holds {theirs.structure} on {len(theirs.plan.sites)} sites, whose form "
            f"is not that of {name!r}; load it under a name of its own instead"
        )
    return theirs


def sources(
    model: nn.Module, names: Iterable[str], value: Initializer
) -> Mapping[Need, Mapping[str, LowRank | Tensor]]:
    """What an initializer needs from its `folder`, for the sites called so. Raises InputError where
    no folder is named, FileError where it lacks one of them."""
    needs = value.needs & {Need.UPDATES, Need.WEIGHTS}
    if needs and not value.folder:
        option = "adapter" if Need.UPDATES in needs else "weights"
        raise InputError(f"{value.kind} needs {option}: name the folder that it starts from")
    found: dict[Need, Mapping[str, LowRank | Tensor]] = {}
    if Need.UPDATES in needs:
        found[Need.UPDATES] = updates(model, list(names), value.folder)
    if Need.WEIGHTS in needs:
        found[Need.WEIGHTS] = weights(model, list(names), value.folder)
    return found


def updates(model: nn.Module, names: list[str], folder: str) -> dict[str, LowRank]:
    """ΔW of the adapter in a folder at these sites of a model, strength included."""
    state = settle(model, read_for(model, folder).state)
    held = sites(model, [s.name for s in state.plan.sites], state.structure)
    deltas = Deltas(state, lambda shape: held[shape.name])
    for name in names:
        if name not in deltas:
            raise InputError(f"{folder!r} does not adapt {name!r}; {nearest(name, deltas)}")
    return {name: update_of(deltas[name], state.strength) for name in names}


def weights(model: nn.Module, names: list[str], folder: str) -> dict[str, Tensor]:
    """The weights (out, in) of a folder, or a file, of safetensors at these sites of a model."""
    place = Path(folder).expanduser()
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files:
        raise FileError(f"{place} holds no weights in .safetensors files")
    hosts = sites(model, names, Structure())
    wanted = {f"{name}.weight": name for name in names}
    found, seen = dict[str, Tensor](), list[str]()
    for file in files:
        for key, tensor in read_tensors(file).tensors.items():
            seen.append(key)
            for ending, name in wanted.items():
                if key == ending or ending.endswith(f".{key}") or key.endswith(f".{ending}"):
                    shape = hosts[name].shape.out_features, hosts[name].shape.in_features
                    found[name] = tensor if tuple(tensor.shape) == shape else tensor.mT
                    if tuple(found[name].shape) != shape:
                        raise FileError(f"{file}: {key!r} is {tuple(tensor.shape)}, not {shape}")
    for ending, name in wanted.items():
        if name not in found:
            raise FileError(f"{place} has no tensor {ending!r}; {nearest(ending, seen)}")
    return found
