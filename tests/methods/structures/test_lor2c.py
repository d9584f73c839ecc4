"""LoR2C against its definition, its counts, and its measure of a spectrum."""

import copy

import pytest
import torch
from peers import built
from torch import nn

import finespun as fs
from finespun.contract import TensorSite
from finespun.errors import PlanError, StateError, TargetError
from finespun.methods.structures import LoR2C


def blocks(count, width, kind="block"):
    return [TensorSite(f"layer.{i}", torch.zeros(width, width), kind=kind) for i in range(count)]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, h):
        return torch.tanh(self.fc(h))


class Stack(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.layer = nn.ModuleList(Block(width) for width in widths)

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return x


@pytest.mark.parametrize("share", [False, True])
def test_the_output_is_the_block_s_and_the_bypass(share):
    model, x = Stack(8, 8), torch.randn(5, 8)
    plain = copy.deepcopy(model.layer)
    before = model(x)
    adapter = fs.adapt(model, LoR2C(rank=2, alpha=6.0, share=share), r"layer\.\d", train_modules=())
    assert torch.equal(model(x), before)
    h = x
    for layer, delta in zip(plain, adapter.deltas.values()):
        delta.B.data.normal_()
        A = adapter.attached.bank.A if share else delta.A
        h = layer(h) + 3.0 * h @ A.T @ delta.B.T
    torch.testing.assert_close(model(x), h)
    with pytest.raises(StateError):
        adapter.merge()


@pytest.mark.slow
def test_counts():
    own, shared = LoR2C(rank=8), LoR2C(rank=8, share=True)
    assert own.total_parameters(own.plan(blocks(12, 768))) == 147_456
    assert shared.total_parameters(shared.plan(blocks(12, 768))) == 79_872
    assert own.flops(blocks(1, 768)[0].shape) == 24_576
    assert own.total_parameters(own.plan(blocks(32, 4096))) == 2_097_152


def test_a_shared_a_is_one_tensor_and_needs_one_width():
    deltas, bank, _ = built(LoR2C(rank=2, share=True), *blocks(3, 8))
    assert all(d.low_rank()[0] is bank.A for d in deltas)
    with pytest.raises(PlanError, match=r"'layer.0' has 8.*'layer.1' has 12.*share=False"):
        fs.adapt(Stack(8, 12), LoR2C(rank=2, share=True), r"layer\.\d", train_modules=())


def test_a_container_is_no_block():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    with pytest.raises(TargetError, match=r"'0' is a Sequential.*inside it"):
        fs.adapt(model, LoR2C(rank=2), ["0"], train_modules=())
    assert type(model[0]) is nn.Sequential


def test_the_measure_of_a_spectrum():
    (delta,), _, _ = built(LoR2C(rank=4), *blocks(1, 12))
    assert delta.diagnostics() == {}
    delta.B.data.normal_()
    σ = torch.linalg.svdvals((delta.B @ delta.A).detach().double())
    wanted = 1 - float(σ[:2].sum() / σ.sum())
    assert delta.diagnostics()["sfs"] == pytest.approx(wanted, abs=1e-6)
    delta.B.data[:, 1:] = 0
    assert delta.diagnostics()["sfs"] == pytest.approx(0, abs=1e-6)
    delta.A.data.copy_(torch.linalg.qr(torch.randn(12, 4))[0].T)
    delta.B.data.copy_(torch.linalg.qr(torch.randn(12, 4))[0])
    assert delta.diagnostics()["sfs"] == pytest.approx(0.5, abs=1e-6)


def test_a_compact_bypass_is_a_smaller_bypass():
    model, x = Stack(8, 8), torch.randn(5, 8)
    adapter = fs.adapt(model, LoR2C(rank=4), r"layer\.\d", train_modules=())
    for delta in adapter.deltas.values():
        delta.B.data.normal_()
        delta.switch_off(delta.groups("rank")[1])
    before = model(x)
    adapter.compact()
    assert adapter.structure.kind == "lor2c"
    assert adapter.num_update_parameters == 2 * 2 * 3 * 8
    torch.testing.assert_close(model(x), before)


class Attention(nn.Module):
    """h + attention of h, its weights a hundredth of their usual size."""

    def __init__(self, width):
        super().__init__()
        for name in "qkvo":
            layer = nn.Linear(width, width, bias=False)
            layer.weight.data *= 0.01
            self.add_module(name, layer)

    def forward(self, h):
        mixed = torch.softmax(self.q(h) @ self.k(h).mT, dim=-1) @ self.v(h)
        return h + self.o(mixed)


def test_the_gradient_reaches_the_first_layer():
    torch.manual_seed(0)
    model, x, norms = nn.Module(), torch.randn(4, 5, 16), {}
    model.layer = nn.ModuleList(Attention(16) for _ in range(12))
    model.forward = lambda h: [h := layer(h) for layer in model.layer][-1]
    for form, targets in ((LoR2C(rank=2), r"layer\.\d+"), (fs.LoRA(rank=2), ["q"])):
        adapter = fs.adapt(model, form, targets, train_modules=())
        model(x).square().sum().backward()
        norms[form.kind] = float(next(iter(adapter.deltas.values())).B.grad.norm())
        adapter.detach()
    assert norms["lor2c"] > 1000 * norms["lora"] > 0
