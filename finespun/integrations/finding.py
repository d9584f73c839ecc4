"""Which adapter of a model is in training."""

from torch import nn

from finespun.adapter import Adapter
from finespun.errors import InputError
from finespun.hosts import AdapterSet


def adapted(model: nn.Module) -> nn.Module | None:
    """The module that holds adapters: the model itself, what a wrapper (DistributedDataParallel,
    torch.compile) holds, or a part of it, as in a SentenceTransformer; else None."""
    for module in model.modules():
        if isinstance(module.__dict__.get("_finespun_adapters"), AdapterSet):
            return module
    return None


def in_training(model: nn.Module) -> Adapter:
    """The adapter of a model, or of a part of it, that is active and can be trained. Raises
    InputError where there is none, or more than one."""
    root = adapted(model)
    if root is None:
        raise InputError(
            f"this {type(model).__name__} has no adapter: call fs.adapt(model, ...) or "
            "fs.load(model, folder, trainable=True) first"
        )
    adapter_set: AdapterSet = root.__dict__["_finespun_adapters"]
    live = {name: adapter_set.attached[name] for name, _ in adapter_set.active}
    found = [n for n, a in live.items() if any(p.requires_grad for p in a.parameters())]
    if len(found) == 1:
        return Adapter(root, found[0])
    if found:
        raise InputError(f"{', '.join(found)} can all be trained: say which, adapter=...")
    raise InputError(
        f"no active adapter of this {type(model).__name__} can be trained; there are "
        f"{', '.join(adapter_set.states)}: call make_trainable() on one, or load it with "
        "trainable=True"
    )
