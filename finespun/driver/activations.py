"""What layers read, before training: how active its features are, and how they vary together."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finespun.errors import InputError
from finespun.hosts import Host, modules
from finespun.hosts.coupling import family

Of = Callable[[Tensor], Tensor]


class Means:
    """Mean of a function of the rows that modules read, by a pre-hook on each module."""

    def __init__(self, readers: Mapping[str, str], of: Of) -> None:
        self.readers, self.of = readers, of  # site -> the module whose inputs tell
        self.sums: dict[str, Tensor] = {}
        self.counts = dict.fromkeys(readers.values(), 0)

    def hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        """Adds what module `name` is about to read."""

        @torch.no_grad()
        def before(layer: nn.Module, args: Any) -> None:
            x = args[0].detach().flatten(0, -2)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            self.sums[name] = self.of(x) + self.sums.get(name, 0.0)
            self.counts[name] += len(x)

        return before

    def means(self) -> dict[str, Tensor]:
        """Site -> mean over all rows. Raises InputError for a module that never ran."""
        for name, count in self.counts.items():
            if not count:
                raise InputError(
                    f"{name!r} never ran: give batches, and a call that runs the model"
                )
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
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


@contextmanager
def watch_covariances(model: nn.Module, hosts: Mapping[str, Host]) -> Iterator[Means]:
    """E[x xᵀ] (in, in) of what these sites read. Raises InputError for layers whose inputs are no
    rows of features: tables, convolutions, blocks."""
    for name, host in hosts.items():
        if host.shape.kind != "linear":
            raise InputError(
                f"{name!r} is of kind {host.shape.kind}: covariances are of linear ones"
            )
    with _watched(modules(model), Means({n: n for n in hosts}, lambda x: x.mT @ x)) as found:
        yield found


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
