"""The tensors of an adapted model as a plain model would have them."""

from torch import Tensor, nn

from finespun.hosts.adapter_set import adapter_set_of
from finespun.hosts.buffers import ROOT
from finespun.hosts.targets import INSERTED


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as the plain model would have it: no tensor of adapters, but what is merged is
    in it, and where it is active too, its trained modules and moved buffers in the place of the
    base's own."""
    state = {
        key: value.detach()
        for key, value in model.state_dict().items()
        if not any(part in INSERTED for part in key.split("."))
    }
    if "_finespun_adapters" not in model.__dict__:
        return state
    adapter_set = adapter_set_of(model)
    whole = [name for name, _ in adapter_set.active if name in adapter_set.merged]
    values = adapter_set.buffers.as_of(whole)
    for (place, leaf), value in values.items():
        key = leaf if place == ROOT else f"{place}.{leaf}"
        if key in state:
            state[key] = value
    for name in whole:
        for place, module in adapter_set.attached[name].copies.items():
            for key, value in module.state_dict().items():
                base = state.get(f"{place}.{key}", value)
                state[f"{place}.{key}"] = value.detach().to(base.dtype)
    return state
