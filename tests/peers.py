"""What the tests of single methods share: sites, stirred deltas, PEFT's layers, fingerprints."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import finespun as fs
from finespun.contract import Bank, Delta, Plan, Structure, TensorSite
from finespun.methods.structures.pieces.frozen import Frozen


def site(out: int, inner: int, name: str = "site", seed: int = 7) -> TensorSite:
    """A site whose weight (out, inner) is normal, in float64."""
    g = torch.Generator().manual_seed(seed)
    return TensorSite(name, torch.randn(out, inner, generator=g, dtype=torch.float64))


def built(form: Structure, *sites: TensorSite) -> tuple[list[Delta], Bank | None, Plan]:
    """The deltas of all sites, their bank and their plan, at the start."""
    plan = form.plan(sites)
    bank = form.bank(plan)
    return [form.build(s, plan, bank) for s in sites], bank, plan


def moved(form: Structure, *sites: TensorSite) -> list[Delta]:
    """As `built`, in float64, with every trained parameter normal."""
    deltas, bank, _ = built(form, *sites)
    g = torch.Generator().manual_seed(11)
    for module in [*deltas, *([] if bank is None else [bank])]:
        module.double()
        for p in module.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    return deltas


def update(delta: Delta) -> Tensor:
    """ΔW of a float64 delta."""
    return delta.dense(delta.base_weight()).detach()


def rank(delta: Delta) -> int:
    """The numerical rank of ΔW."""
    return int(torch.linalg.matrix_rank(update(delta)))


def give(frozen: Frozen, tensor: Tensor) -> None:
    """Let frozen parameters be these instead of what their stream says."""
    frozen.held[tensor.device] = tensor.detach().clone()


def fingerprint(tensor: Tensor) -> str:
    """Sixteen hexadecimal digits of SHA-256 over the bytes of a tensor."""
    return hashlib.sha256(tensor.detach().contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


def size_of_file(*deltas: Delta) -> int:
    """Bytes of a safetensors file with the saved parameters of the deltas and their bank."""
    named = {f"delta/{d.site.shape.name}/{k}": v for d in deltas for k, v in d.state_dict().items()}
    if deltas[0].bank is not None:
        named |= {f"bank/{k}": v for k, v in deltas[0].bank.state_dict().items()}
    return len(save({k: v.float().contiguous() for k, v in named.items()}))


def largest_tensor(run: Callable[[], object]) -> int:
    """Parameters in the greatest tensor that any operation makes while `run` is called."""

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            made = call(*args, **(kwargs or {}))
            found = [t.numel() for t in tree_leaves(made) if isinstance(t, Tensor)]
            Watch.most = max([Watch.most, *found])
            return made

    with Watch():
        run()
    return Watch.most


class Layers(nn.Module):
    """Linear layers called fc0, fc1, ... of the given (out, in)."""

    def __init__(self, *shapes: tuple[int, int], bias: bool = False) -> None:
        super().__init__()
        for i, (out, inner) in enumerate(shapes):
            self.add_module(f"fc{i}", nn.Linear(inner, out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return x


def peft(config: Any, *shapes: tuple[int, int], bias: bool = False) -> nn.Module:
    """PEFT's model around `Layers`; its layers are .fc0, .fc1, ..."""
    from peft import get_peft_model

    torch.manual_seed(3)
    config.target_modules = [f"fc{i}" for i in range(len(shapes))]
    wrapped = get_peft_model(Layers(*shapes, bias=bias), config)
    for name, p in wrapped.named_parameters():
        if p.requires_grad and "base_layer" not in name:
            nn.init.normal_(p, std=0.3)
    return wrapped.base_model.model


def agrees(delta: Delta, layer: nn.Module) -> float:
    """The greatest relative difference between PEFT's change of the output and ours."""
    x = torch.randn(5, layer.in_features)
    theirs = layer(x) - layer.base_layer(x)
    return float(((delta(x) - theirs).norm() / theirs.norm()).detach())


def adapted(form: Structure, layer: nn.Module) -> tuple[nn.Linear, Delta]:
    """A plain copy of the layer under PEFT's, with our adapter on it, and its delta."""
    base = layer.base_layer
    model = Layers(tuple(base.weight.shape), bias=base.bias is not None)
    model.fc0.load_state_dict(base.state_dict())
    return model.fc0, fs.adapt(model, form, ["fc0"], train_modules=()).deltas["fc0"]


@torch.no_grad()
def outputs_agree(ours: nn.Module, layer: nn.Module) -> float:
    """The difference of the two layers' outputs, relative to how far PEFT moves them."""
    x = torch.randn(2, 5, layer.in_features)
    theirs = layer(x)
    return float((ours(x) - theirs).norm() / (theirs - layer.base_layer(x)).norm())


def fit(form: Structure, target: Tensor, rate: float, steps: int, rows: int = 64) -> float:
    """‖ΔW − target‖ after AdamW with a linear fall of its rate, on fresh normal inputs."""
    (delta,), bank, _ = built(form, site(*target.shape))
    numbers = [*delta.parameters(), *([] if bank is None else bank.parameters())]
    optimizer = torch.optim.AdamW(numbers, lr=rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        x = torch.randn(rows, target.shape[1])
        loss = (delta(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((update(delta) - target).norm())


class Sizes(TorchDispatchMode):
    """Counts the parameters of every dense tensor that operators allocate, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in _dense(args) + _dense(kwargs)}
        self.found += [
            t.numel() for t in _dense(out) if t.untyped_storage().data_ptr() not in given
        ]
        return out


def _dense(values: object) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [t for t in leaves if isinstance(t, Tensor) and t.layout == torch.strided]
