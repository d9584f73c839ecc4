"""What training an adapter freezes in its model, and gives back when the adapter leaves."""

from collections.abc import Iterable, Mapping

from torch import nn

from finespun.hosts.adapter_set import AdapterSet
from finespun.hosts.attached import Attached
from finespun.hosts.stale import note_frozen

RECORD = "_finespun_frozen"


def in_training(model: nn.Module) -> list[str]:
    """Names of adapters that act now and whose parameters are trained."""
    adapter_set = model.__dict__.get("_finespun_adapters")
    if not isinstance(adapter_set, AdapterSet):
        return []
    acting = [adapter_set.attached[name] for name, _ in adapter_set.active]
    return [made.name for made in acting if any(p.requires_grad for p in made.parameters())]


def was_trainable(model: nn.Module, adapter: Attached) -> bool:
    """Whether the adapter was made trainable in this model, whatever was frozen since."""
    return adapter.name in model.__dict__.get(RECORD, {})


def freeze_others(model: nn.Module, name: str, mine: Iterable[nn.Parameter]) -> None:
    """Freeze every parameter of the model that is not among `mine`, those of adapter `name`, and
    keep a record of what could be trained before."""
    frozen = model.__dict__.setdefault(RECORD, {}).setdefault(name, [])
    own = {id(p) for p in mine}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in own:
            parameter.requires_grad_(False)
            frozen.append(parameter)
            note_frozen(parameter, name)


def give_back(model: nn.Module, name: str, others: Mapping[str, Iterable[nn.Parameter]]) -> None:
    """Adapter `name` has left: what it froze can be trained again, unless one of the adapters that
    stay (name -> its parameters) keeps it frozen."""
    records = model.__dict__.get(RECORD, {})
    theirs = {id(p) for numbers in others.values() for p in numbers}
    for parameter in records.pop(name, []):
        if not others or id(parameter) in theirs:
            parameter.requires_grad_(True)
        else:
            records.setdefault(next(iter(others)), []).append(parameter)
    if not others:
        model.__dict__.pop(RECORD, None)
