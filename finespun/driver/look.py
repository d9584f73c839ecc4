"""What methods need to see of the base before training, measured in one pass over some batches."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finespun.contract import Scores, Structure
from finespun.contract.need import MEASURED, Need
from finespun.driver.activations import Masks, watch_activations, watch_inputs
from finespun.driver.gradients import Loss, Sums, watch_gradients
from finespun.driver.reducing import reduced
from finespun.driver.sketch import watch_sketches
from finespun.errors import InputError
from finespun.hosts import disabled, materialise
from finespun.hosts import sites as sites_of
from finespun.hosts.modes import evaluating
from finespun.linalg import LowRank

Seen = Tensor | LowRank


class Look:
    """What was measured at every site, by need; a tensor is handed out once and then let go.

    `seconds` is how long it took. It is `contract.Measured` for hooks, and `scores` for a
    structure's plan.
    """

    def __init__(
        self,
        found: Mapping[Need, dict[str, Seen]],
        seconds: float = 0.0,
        again: Callable[[], float] | None = None,
    ) -> None:
        self.found, self.seconds, self.again = dict(found), seconds, again

    def scores(self, structure: Structure) -> Scores | None:
        """What this structure chooses or starts by, every site's; None where it needs nothing."""
        wanted = sorted(structure.needs & MEASURED)
        if not wanted:
            return None
        return {n: _dense(t) for n, t in self.found[wanted[0]].items()}

    def keep(self, needs: Collection[Need]) -> None:
        """Let go of what nobody needs any more."""
        self.found = {need: found for need, found in self.found.items() if need in needs}

    def gradient(self, site: str) -> Tensor:
        """∂L/∂W0 (out, in). Raises InputError where it was not measured, or was handed out."""
        return _dense(self._take(Need.GRADIENTS, site))

    def activation(self, site: str) -> Tensor:
        """Mean |h| of what the site reads or writes, (features,)."""
        return _dense(self._take(Need.ACTIVATIONS, site))

    def covariance(self, site: str) -> Tensor:
        """E[x xᵀ] (in, in) of what the site reads, not centred."""
        return _dense(self._take(Need.COVARIANCE, site))

    def mean(self, site: str) -> Tensor:
        """E[x] (in,) of what the site reads."""
        return _dense(self._take(Need.MEANS, site))

    def weight(self, site: str) -> Tensor:
        """W0 (out, in) as it was before it was quantised."""
        return _dense(self._take(Need.WEIGHTS, site))

    def update(self, site: str) -> LowRank:
        """ΔW of another adapter."""
        found = self._take(Need.UPDATES, site)
        return found if isinstance(found, LowRank) else LowRank.from_dense(found)

    def loss(self) -> float:
        """The mean loss of the rows looked at, with the adapter as it is now."""
        if self.again is None:
            raise InputError(f"no {Need.LOSS} was measured: name Need.LOSS in `needs`")
        return self.again()

    def _take(self, need: Need, site: str) -> Seen:
        if need not in self.found:
            raise InputError(f"no {need} were measured: name Need.{need.name} in `needs`")
        if site not in self.found[need]:
            raise InputError(f"the {need} of {site!r} were not measured, or handed out already")
        return self.found[need].pop(site)


def measure(
    model: nn.Module,
    names: Iterable[str],
    needs: Collection[Need],
    batches: Iterable[Any],
    loss: Loss,
    device: torch.device | str = "cpu",
    masks: Masks | None = None,
    sketch: int | None = None,
) -> Look:
    """Measure what `needs` asks for (gradients, activations, covariance, means, loss) at the sites
    called so.

    The model is its base meanwhile, in the mode that it is in, and goes once over the batches;
    `loss(model, batch)` is as for `estimate_gradients`, and is called without gradients where none
    are needed. Covariance and means are over the tokens that `masks(batch)` marks (all, without).
    With `sketch` a gradient is known by its main `sketch` directions alone, from two passes, and
    nothing of size out x in is held for it. Where torch.distributed runs, every rank calls this
    with rows of its own, and all get the figures of all rows. Raises what `estimate_gradients` and
    `mean_activations` raise.
    """
    started, hosts = time.perf_counter(), sites_of(model, names, Structure())
    if sketch is not None or Need.LOSS in needs:
        batches = list(batches)
    watching: dict[Need, Callable[[], Mapping[str, Seen]]] = {}
    passes = 1
    with ExitStack() as undo:
        if "_finespun_adapters" in model.__dict__:
            undo.enter_context(disabled(model))
        sums: Sums | None = None
        if Need.ACTIVATIONS in needs:
            watching[Need.ACTIVATIONS] = undo.enter_context(watch_activations(model, hosts)).means
        inputs = undo.enter_context(watch_inputs(model, hosts, needs))
        watching |= {need: means.means for need, means in inputs.items()}
        if Need.GRADIENTS in needs and sketch is not None:
            sums = undo.enter_context(watch_sketches(model, hosts, sketch))
            passes = 2
        elif Need.GRADIENTS in needs:
            sums = undo.enter_context(watch_gradients(model, hosts, device))
        if sums is not None:
            watching[Need.GRADIENTS] = sums.means
        undo.enter_context(torch.set_grad_enabled(sums is not None))
        for turn in range(passes):
            for batch in batches if watching or passes > 1 else ():
                for means in inputs.values():
                    means.mask = None if masks is None or turn else masks(batch)
                    means.paused = turn > 0
                value = loss(model, batch)
                if sums is not None:
                    sums.add(value)
            if sums is not None:
                sums.turn()
    found = {need: dict(means()) for need, means in watching.items()}
    again = partial(_loss, model, batches, loss) if Need.LOSS in needs else None
    return Look(found, time.perf_counter() - started, again)


@torch.no_grad()
def _loss(model: nn.Module, batches: Iterable[Any], loss: Loss) -> float:
    """The mean loss of batches in eval mode, adapters as they are, over all ranks."""
    total, weights = 0.0, 0.0
    with evaluating(model):
        for batch in batches:
            found = loss(model, batch)
            value, weight = found if isinstance(found, tuple) else (found, 1.0)
            total, weights = total + float(value) * weight, weights + weight
    both = torch.tensor([total, weights], dtype=torch.float64)
    if dist.is_initialized():
        both = reduced(both, next(model.parameters()).device)
    if not both[1]:
        raise InputError("no batches to take the loss of; give at least one")
    return float(both[0] / both[1])


def _dense(seen: Seen) -> Tensor:
    return seen.dense() if isinstance(seen, LowRank) else seen


def estimate_gradients(
    model: nn.Module,
    sites: Iterable[str],
    batches: Iterable[Any],
    loss: Loss,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """G = ∂L/∂W0, shape (out, in), of every site, for L the mean loss over all batches.

    `loss(model, batch)` is the batch's mean loss (0-d), or (mean loss, weight) where batches count
    differently, by their labelled tokens, say: G = Σ w·∇L_b / Σ w. The model is its base meanwhile,
    in the mode (training or not) that it is in; nothing of it changes, frozen weights included. A
    weight's gradient is added to its sum on `device`, in float32 at least, and let go before the
    next one is formed. Of a weight that two modules share, G is that of the named module's use
    alone, also where an adapter acts at both (tie="both"); a layer that never ran has G = 0. Raises
    TargetError for unknown sites, InputError without batches or for a loss that is no number or
    does not depend on the weights, TrainingError where it is not finite.
    Source: arXiv 2407.05000 (LoRA-GA).
    """
    found = measure(model, sites, {Need.GRADIENTS}, batches, loss, device)
    return {name: found.gradient(name) for name in list(found.found[Need.GRADIENTS])}


def mean_activations(
    model: nn.Module,
    sites: Iterable[str],
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], Any],
) -> dict[str, Tensor]:
    """Mean |h|, (features,), of what each site reads, over all positions of all batches; for layers
    that write hidden features of a block, of these, where they are read.

    Layers that make values for several query heads get one mean for each unit of these instead.
    `call(model, batch)` runs the model, which is its base meanwhile, in the mode that it is in.
    Raises TargetError for unknown sites, InputError for a layer that never ran.
    """
    found = measure(model, sites, {Need.ACTIVATIONS}, batches, call)
    return {name: found.activation(name) for name in list(found.found[Need.ACTIVATIONS])}


def start_from_gradients(model: nn.Module, name: str, batches: Iterable[Any], loss: Loss) -> None:
    """Show every site of adapter `name` its gradient before training, where the structure starts
    from it: masks are chosen, starts drawn. Arguments and errors are those of
    `estimate_gradients`; StateError where the structure does not look at gradients."""
    deltas = materialise(model, name).deltas
    gradients = estimate_gradients(model, deltas, batches, loss)
    for site, delta in deltas.items():
        delta.start_from(gradients.pop(site).to(delta.site.device))
