"""How active the hidden features of chosen layers are, before training: S2FT's rules A and S."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from finespun.contract import Structure
from finespun.errors import InputError
from finespun.hosts import Host, disabled
from finespun.hosts import sites as sites_of
from finespun.hosts.coupling import family
from finespun.hosts.targets import modules


@torch.no_grad()
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
    hosts, known = sites_of(model, sites, Structure()), modules(model)
    readers = {
        n: f.reader if (f := family(known, n)) and h.coupling else n for n, h in hosts.items()
    }
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(readers.values(), 0)

    def add(name: str) -> Callable[[nn.Module, Any], None]:
        def before(layer: nn.Module, args: Any) -> None:
            x = args[0].detach().flatten(0, -2).abs()
            flat = x.to(torch.promote_types(x.dtype, torch.float32))
            sums[name] = flat.sum(0) + sums.get(name, 0.0)
            counts[name] += len(flat)

        return before

    with ExitStack() as undo:
        if "_finespun_adapters" in model.__dict__:
            undo.enter_context(disabled(model))
        for name in counts:
            layer = known[name.partition(":")[0]]
            undo.callback(layer.register_forward_pre_hook(add(name)).remove)
        for batch in batches:
            call(model, batch)
    for name, count in counts.items():
        if not count:
            raise InputError(f"{name!r} never ran: give batches, and a call that runs the model")
    means = {name: total / counts[name] for name, total in sums.items()}
    return {name: _own(host, means[readers[name]]) for name, host in hosts.items()}


def _own(host: Host, mean: Tensor) -> Tensor:
    """What a reader takes, as its block's other layers have it: fewer values than query heads are
    told unit by unit."""
    sizes = host.shape.out_features, host.shape.in_features
    if len(mean) in sizes or host.coupling is None:
        return mean
    return mean.view(host.coupling.units, -1).mean(1)
