"""What layers read, before training: how active its features are, and how they vary together."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract.need import Need
from finespun.driver.reducing import reduced
from finespun.errors import InputError
from finespun.hosts import Host, modules
from finespun.hosts.coupling import family

Of = Callable[[Tensor], Tensor]
Masks = Callable[[Any], Tensor | None]


class Means:
    """Mean of a function of the rows that modules read, by a pre-hook on each module. Of inputs of
    the shape of `mask` (batch, tokens) only the marked rows count; while `paused` none do."""

    mask: Tensor | None = None
    paused = False

    def __init__(self, readers: Mapping[str, str], of: Of) -> None:
        self.readers, self.of = readers, of  # site -> the module whose inputs tell
        self.device = torch.device("cpu")
        self.sums: dict[str, Tensor] = {}
        self.counts = dict.fromkeys(readers.values(), 0)

    def hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        """Adds what module `name` is about to read."""

        @torch.no_grad()
        def before(layer: nn.Module, args: Any) -> None:
            if self.paused:
                return
            x = args[0].detach()
            marked = self.mask is not None and self.mask.shape == x.shape[:-1]
            x = x[self.mask.to(x.device)] if marked and self.mask is not None else x.flatten(0, -2)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            self.device = x.device
            self.sums[name] = self.of(x) + self.sums.get(name, 0.0)
            self.counts[name] += len(x)

        return before

    def means(self) -> dict[str, Tensor]:
        """Site -> mean over all rows. Raises InputError for a module that never ran."""
        means = {}
        for name, own in self.counts.items():
            count = float(reduced(torch.tensor(float(own), dtype=torch.float64), self.device))
            if not count:
                raise InputError(
                    f"{name!r} never ran: give batches, and a call that runs the model"
                )
            means[name] = reduced(self.sums[name], self.device) / count
        return {site: means[reader] for site, reader in self.readers.items()}


class Activations(Means):
    """Mean |h| (features,) of what each site reads; of layers that write hidden features of a
    block, of these, where they are read, one for each unit where layers make values for several
    heads."""

    def __init__(self, known: Mapping[str, nn.Module], hosts: Mapping[str, Host]) -> None:
        self.hosts = hosts
        readers = {
            n: f.reader if (f := family(known, n)) and h.coupling else n for n, h in hosts.items()
        }
        super().__init__(readers, lambda x: x.abs().sum(0))

    def means(self) -> dict[str, Tensor]:
        return {name: _own(self.hosts[name], mean) for name, mean in super().means().items()}


@contextmanager
def watch_activations(model: nn.Module, hosts: Mapping[str, Host]) -> Iterator[Means]:
    """Mean activations at these sites, from the passes inside the block."""
    known = modules(model)
    with _watched(known, Activations(known, hosts)) as found:
        yield found


INPUTS: Mapping[Need, Of] = {
    Need.COVARIANCE: lambda x: x.mT @ x,
    Need.MEANS: lambda x: x.sum(0),
}


@contextmanager
def watch_inputs(
    model: nn.Module, hosts: Mapping[str, Host], needs: Collection[Need]
) -> Iterator[dict[Need, Means]]:
    """E[x xᵀ] (in, in) and E[x] (in,) of what these sites read, as far as they are needed. Raises
    InputError for layers whose inputs are no rows of features: tables, convolutions, blocks."""
    wanted = [need for need in INPUTS if need in needs]
    for name, host in hosts.items() if wanted else ():
        if host.shape.kind != "linear":
            raise InputError(
                f"{name!r} is of kind {host.shape.kind}: the {wanted[0]} is of linear ones"
            )
    found = {need: Means({n: n for n in hosts}, INPUTS[need]) for need in wanted}
    with ExitStack() as undo:
        for means in found.values():
            undo.enter_context(_watched(modules(model), means))
        yield found


def trained_tokens(batch: Any) -> Tensor | None:
    """Which tokens (batch, tokens) of a batch are trained, or else no padding; None: unknown."""
    if not isinstance(batch, Mapping):
        return None
    labels, attended = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return labels != -100
    return attended.bool() if isinstance(attended, Tensor) and attended.dim() == 2 else None


@contextmanager
def _watched(known: Mapping[str, nn.Module], means: Means) -> Iterator[Means]:
    hooks = [
        known[name.partition(":")[0]].register_forward_pre_hook(means.hook(name))
        for name in means.counts
    ]
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()


def _own(host: Host, mean: Tensor) -> Tensor:
    """What a reader takes, as its block's other layers have it: fewer values than query heads are
    reported unit by unit."""
    sizes = host.shape.out_features, host.shape.in_features
    if len(mean) in sizes or host.coupling is None:
        return mean
    return mean.view(host.coupling.units, -1).mean(1)
