"""The object a user holds: one adapter on one model, for the rest of its life."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Never

from torch import Tensor, nn

from finespun import files, hosts
from finespun.adapters.lineage import Lineage
from finespun.adapters.state import AdapterState
from finespun.contract import Delta, Initializer, Scores, Structure, calculus
from finespun.deprecated import renamed
from finespun.driver import begin
from finespun.driver.gradients import Loss
from finespun.errors import InputError, StateError, TargetError
from finespun.hosts.left_out import warn_of_smaller_ranks
from finespun.hosts.targets import Targets, inside
from finespun.linalg import LowRank


@renamed(train="train_modules")
def adapt(
    model: nn.Module,
    structure: Structure,
    targets: Targets,
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
) -> "Adapter":
    """Attach a new trainable adapter; the model stays the object and the class it was.

    `finespun.adapt` says what each argument is; here the structure and the targets are chosen
    already. Warns of layers that got a smaller rank. Raises TargetError, PlanError or InputError;
    the model stays as it was.
    """
    hosts.check_model(model)
    if not isinstance(structure, Structure):
        raise InputError(f"structure={structure!r} must be an instance such as fs.LSR(rank=4)")
    if tie not in (None, "both"):
        raise InputError(f"tie={tie!r} is not known; try 'both', or leave it out")
    own = modules_to_save if train_modules is None else train_modules
    if isinstance(own, str):
        own = (own,)
    trained = hosts.find_head(model) if own is None else tuple(own)
    found = hosts.find(model, targets, exclude, layers)
    names = [n for n in found if not inside(n, trained)]
    if found and not names:
        raise TargetError(
            f"every target lies in a module that is trained whole: {', '.join(trained)}; "
            "leave it out of train_modules, or pass targets=[] to train modules alone"
        )
    if not names and not trained:
        raise TargetError('no layer and no module to train; name layers, or use "all-linear"')
    attached = hosts.new_adapter(model, name, structure, names, trained, scores, tie == "both")
    warn_of_smaller_ranks(structure, attached.plan)
    adapter = Adapter(model, name)
    if exact_start and not structure.starts_at_zero:
        for delta in attached.deltas.values():
            delta.keep_start()
    adapter.make_trainable()
    hosts.activate(model, name)
    if initializer is not None:
        begin(model, name, initializer, batches, loss, files.sources, structure.seed)
    return adapter


def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    force: bool = False,
    trainable: bool = False,
    strict: bool = True,
    part: str | None = None,
) -> "Adapter":
    """Load an adapter that Finespun, PEFT, diffusers or kohya's scripts wrote, and activate it.

    `finespun.load` says what each argument is, and fetches from the Hub. Raises FileError,
    BaseMismatch, TargetError or PlanError, and leaves the model untouched.
    """
    hosts.check_model(model)
    saved = files.read_for(model, folder, strict, part).named(name)
    notes = files.register_saved(model, saved, force)
    name = saved.state.name
    try:
        hosts.activate(model, name)
    except BaseException:
        hosts.remove(model, name)
        raise
    adapter = Adapter(model, name)
    if trainable:
        adapter.make_trainable()
    else:
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    for note in notes:
        warnings.warn(f"{folder}: {note}", stacklevel=2)
    return adapter


class Adapter:
    """A handle on adapter `name` of `model`. Printing it shows targets, parameters and norms."""

    def __init__(self, model: nn.Module, name: str) -> None:
        hosts.adapter_set_of(model)[name]
        self.model, self.name = model, name
        self.left_out: tuple[str, ...] = ()  # what "all-linear" did not reach

    @property
    def _held(self) -> hosts.Attached | AdapterState:
        """What the model holds of this adapter: modules, or a state that sleeps."""
        return hosts.adapter_set_of(self.model)[self.name]

    @property
    def attached(self) -> hosts.Attached:
        """The adapter's modules in the model; created if it was never active."""
        return hosts.materialise(self.model, self.name)

    entry = attached  # its name in 0.1

    def state(self) -> AdapterState:
        """The adapter without the model, as it is now: what training does later leaves it alone."""
        return files.state_of(self.model, self.name, copy=True)

    @property
    def structure(self) -> Structure:
        return self._held.structure

    @property
    def lineage(self) -> Lineage | None:
        """Who made the adapter, where that is known; saved with it."""
        return self._held.lineage

    @property
    def deltas(self) -> dict[str, Delta]:
        """Site name -> Delta; created if the adapter was never active."""
        return self.attached.deltas

    @property
    def num_parameters(self) -> int:
        """All trained parameters: those of the updates and those of trained modules."""
        return self.num_update_parameters + self.num_module_parameters

    @property
    def num_update_parameters(self) -> int:
        """Trained parameters of the updates, a bank's included."""
        return sum(p.numel() for p in self.attached.update_parameters())

    @property
    def num_module_parameters(self) -> int:
        """Parameters in the adapter's own copies of modules (a fresh head, say)."""
        return sum(p.numel() for p in self.attached.module_parameters())

    @property
    def scale(self) -> float:
        """Strength at inference; 1.0 as trained."""
        return self._held.strength

    @scale.setter
    def scale(self, value: float) -> None:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"scale={value} must be a finite number; 1.0 is as trained")
        hosts.set_strength(self.model, self.name, float(value))

    # --- training --------------------------------------------------------------------------------
    def make_trainable(self) -> "Adapter":
        """Freeze every other parameter of the model and let this adapter's be trained; buffers that
        training moves (running statistics) are its own then. Raises StateError while adapters are
        merged."""
        hosts.check(hosts.adapter_set_of(self.model), "train", self.name)
        hosts.own_buffers(self.model, self.name)
        hosts.freeze_others(self.model, self.name, self.parameters())
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        return self

    def train(self, mode: bool = True) -> Never:
        """Raises StateError: an adapter has no mode of its own; so does `eval`."""
        raise StateError(
            "an adapter has no train() or eval(): make_trainable() lets its parameters be trained, "
            "model.train() and model.eval() set the mode"
        )

    eval = train

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that training moves: updates, bank, and copies of modules."""
        return self.attached.parameters()

    def push(self, v: Mapping[str, Mapping[str, Tensor]]) -> dict[str, LowRank | Tensor]:
        """J v at every site, for a change `v[site][name]` of the trained parameters, those of the
        bank under v["bank"]: the keys that `pull` returns."""
        shared = v.get("bank", {})
        return {n: calculus.push(d, {**v.get(n, {}), **shared}) for n, d in self.deltas.items()}

    def pull(self, M: Mapping[str, LowRank | Tensor]) -> dict[str, dict[str, Tensor]]:
        """Jᵀ M: by site and, summed over the sites, for the bank under the key "bank"."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, delta in self.deltas.items():
            for key, value in calculus.pull(delta, M[name]).items():
                place = found.setdefault("bank" if key.startswith("bank.") else name, {})
                place[key] = place[key] + value if key in place else value
        return found

    def compact(self) -> "Adapter":
        """Remove what was switched off; where the structure cannot say it, become LoRAs of each
        site's own rank. Shapes change: afterwards build a new optimiser."""
        hosts.compact(self.model, self.name)
        return self

    # --- files ------------------------------------------------------------------------------------
    def save(self, folder: str | Path, lineage: Lineage | None = None) -> None:
        """Write adapter.safetensors and adapter.json, whole or not at all: an adapter that is there
        is replaced, as by torch.save; other files stay, a README.md of your own too. `lineage` says
        who made the adapter; without it, that of the file it came from. Raises FileError where the
        folder cannot be written, StateError for NaN."""
        files.save(self.model, self.name, folder, lineage)

    def export(
        self,
        folder: str | Path,
        rank: int | None = None,
        max_error: float | None = None,
        allow_full: bool = True,
        per_module_rank: bool = False,
        portable: bool = True,
        format: files.Format = "peft",
        part: str | None = None,
    ) -> files.Exported:
        """Write PEFT's LoRA files, which PEFT, vLLM, llama.cpp and others load unchanged, or with
        `format` "diffusers" or "kohya" one file that these load; an older one is replaced.

        Exact where the structure has factors and `rank` is not below theirs, else the best
        approximation, with a warning that says how far off it is; InputError beyond `max_error`.
        `allow_full=False` leaves trained modules out; `per_module_rank` gives every layer its own
        rank, which PEFT alone reads; `portable=False` writes all that PEFT alone reads: DoRA as it
        is, embeddings, convolutions, biases, trained tokens. `part` names the part of a pipeline
        ("unet", ...) where the model's class does not show it. Printing the result shows all.
        """
        done = files.export(
            self.model,
            self.name,
            folder,
            rank,
            max_error,
            allow_full,
            per_module_rank=per_module_rank,
            portable=portable,
            format=format,
            part=part,
        )
        if done.error or done.dropped:
            warnings.warn(str(done), stacklevel=2)
        return done

    def swap(self, folder: str | Path, force: bool = False, strict: bool = True) -> "Adapter":
        """Take over the parameters of a saved adapter with the same sites, ranks and trained
        modules.

        They are copied into the tensors that are there: a compiled model runs on without another
        compilation. Raises InputError where the two differ in form, BaseMismatch for another base
        unless `force`, StateError while this adapter is merged; nothing has changed then.
        """
        theirs = files.alike(self.model, self.name, folder, force, strict)
        hosts.swap(self.model, self.name, theirs)
        return self

    # --- using -----------------------------------------------------------------------------------
    def activate(self) -> "Adapter":
        """Make this the one active adapter."""
        hosts.activate(self.model, self.name)
        return self

    def disabled(self) -> AbstractContextManager[None]:
        """Inside `with adapter.disabled():` the model is its base, bit for bit."""
        return hosts.disabled(self.model)

    def merge(
        self, weight: float = 1.0, undo: Literal["memory", "entries", "none"] = "memory"
    ) -> int:
        """Fold the update into the base weights; returns the bytes kept for `unmerge`.

        undo="memory" keeps the old weights by pointer, "entries" only what an update of few entries
        (SHiRA, S2FT) wrote over, "none" nothing: then it cannot be undone.
        """
        return hosts.merge(self.model, {self.name: weight}, undo)

    def unmerge(self) -> None:
        """Put the original weights, or entries, back. Raises StateError for entries that somebody
        edited meanwhile."""
        hosts.unmerge(self.model)

    def bake(self, weight: float | None = None) -> nn.Module:
        """End the adapter in the model, which goes on computing the same: the update is folded into
        the weights for good, trained modules and buffers take the place of the base's own. Returns
        the model, plain, ready for `save_pretrained` or another adapter. `weight` is the one with
        which it acts now, else 1. `finespun.bake` takes several adapters and says what is
        refused."""
        return hosts.bake(self.model, [self.name] if weight is None else {self.name: weight})

    def detach(self) -> None:
        """Take the adapter out; after the last one the model is what it was."""
        hosts.detach(self.model, self.name)

    def updates(self, rank: int | None = None, energy: float | None = None) -> dict[str, LowRank]:
        """Each site's ΔW as a LowRank, strength included; exact where the structure has factors."""
        return {n: d.as_low_rank(rank, energy) * self.scale for n, d in self.deltas.items()}

    def norms(self) -> dict[str, float]:
        """‖ΔW‖_F of every site that changes a weight."""
        return self.attached.norms()

    def __repr__(self) -> str:
        sites, norms = self._held.plan.sites, list(self.norms().values())
        kinds = sorted({f"{s.out_features}x{s.in_features}" for s in sites})
        leaves = sorted({s.name.rsplit(".", 1)[-1] for s in sites})
        trained = f", trains {', '.join(self._held.trained)}" if self._held.trained else ""
        modules = self.num_module_parameters
        where = f" ({', '.join(leaves)}; {', '.join(kinds)})" if sites else ""
        return (
            f"Adapter {self.name!r}: {self.structure}\n"
            f"  {len(sites)} sites{where}{trained}\n"
            f"  {self.num_update_parameters:,} trained parameters"
            + (f" and {modules:,} in trained modules" if modules else "")
            + (f", ‖ΔW‖ {min(norms):.3g} to {max(norms):.3g}" if norms else "")
            + (f"\n  not adapted: {', '.join(self.left_out)}" if self.left_out else "")
        )
