"""What methods need to see of the base before training, measured in one pass over some batches."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract import Scores, Structure
from finespun.contract.need import MEASURED, Need
from finespun.driver.activations import watch_activations, watch_covariances
from finespun.driver.gradients import GradientSums, Loss, watch_gradients
from finespun.errors import InputError
from finespun.hosts import disabled, materialise
from finespun.hosts import sites as sites_of


class Look:
    """What was measured at every site, by need; a tensor is handed out once and then let go.

    `seconds` is how long it took. It is `contract.Measured` for hooks, and `scores` for a
    structure's plan.
    """

    def __init__(self, found: Mapping[Need, dict[str, Tensor]], seconds: float = 0.0) -> None:
        self.found, self.seconds = dict(found), seconds

    def scores(self, structure: Structure) -> Scores | None:
        """What this structure chooses or starts by, every site's; None where it needs nothing."""
        wanted = sorted(structure.needs & MEASURED)
        return self.found[wanted[0]] if wanted else None

    def keep(self, needs: Collection[Need]) -> None:
        """Let go of what nobody needs any more."""
        self.found = {need: found for need, found in self.found.items() if need in needs}

    def gradient(self, site: str) -> Tensor:
        """∂L/∂W0 (out, in). Raises InputError where it was not measured, or was handed out."""
        return self._take(Need.GRADIENTS, site)

    def activation(self, site: str) -> Tensor:
        """Mean |h| of what the site reads or writes, (features,)."""
        return self._take(Need.ACTIVATIONS, site)

    def covariance(self, site: str) -> Tensor:
        """E[x xᵀ] (in, in) of what the site reads, not centred."""
        return self._take(Need.COVARIANCE, site)

    def _take(self, need: Need, site: str) -> Tensor:
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
) -> Look:
    """Measure what `needs` asks for (gradients, activations, covariance) at the sites called so.

    The model is its base meanwhile, in the mode that it is in, and goes once over the batches;
    `loss(model, batch)` is as for `estimate_gradients`, and is called without gradients where none
    are needed. Raises what `estimate_gradients` and `mean_activations` raise.
    """
    started, hosts = time.perf_counter(), sites_of(model, names, Structure())
    watching: dict[Need, Callable[[], dict[str, Tensor]]] = {}
    with ExitStack() as undo:
        if "_finespun_adapters" in model.__dict__:
            undo.enter_context(disabled(model))
        sums: GradientSums | None = None
        if Need.ACTIVATIONS in needs:
            watching[Need.ACTIVATIONS] = undo.enter_context(watch_activations(model, hosts)).means
        if Need.COVARIANCE in needs:
            watching[Need.COVARIANCE] = undo.enter_context(watch_covariances(model, hosts)).means
        if Need.GRADIENTS in needs:
            sums = undo.enter_context(watch_gradients(model, hosts, device))
            watching[Need.GRADIENTS] = sums.means
        undo.enter_context(torch.set_grad_enabled(sums is not None))
        for batch in batches:
            value = loss(model, batch)
            if sums is not None:
                sums.add(value)
    found = {need: means() for need, means in watching.items()}
    return Look(found, time.perf_counter() - started)


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
    return measure(model, sites, {Need.GRADIENTS}, batches, loss, device).found[Need.GRADIENTS]


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
    return measure(model, sites, {Need.ACTIVATIONS}, batches, call).found[Need.ACTIVATIONS]


def start_from_gradients(model: nn.Module, name: str, batches: Iterable[Any], loss: Loss) -> None:
    """Show every site of adapter `name` its gradient before training, where the structure starts
    from it: masks are chosen, starts drawn. Arguments and errors are those of
    `estimate_gradients`; StateError where the structure does not look at gradients."""
    deltas = materialise(model, name).deltas
    gradients = estimate_gradients(model, deltas, batches, loss)
    for site, delta in deltas.items():
        delta.start_from(gradients.pop(site).to(delta.site.device))
