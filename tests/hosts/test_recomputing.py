"""Gradient checkpointing: the gradients of the forward pass that was run, or a refusal."""

import pytest
import torch
from suite import relative, stir
from tiny import SIZE, hugging, words
from torch import nn
from torch.utils.checkpoint import checkpoint

import finespun as fs
from finespun.errors import StateError

STRUCTURES = {
    "lora": fs.LoRA(rank=2),
    "lsr": fs.LSR(rank=2, separation_rank=2),
    "dora": fs.make("dora", rank=2),
    "unilora": fs.make("unilora", size=60),
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)


class Recomputes(nn.Module):
    """Three layers whose activations are recomputed in the backward pass."""

    def __init__(self, reentrant=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(lambda z, f=layer: torch.tanh(f(z)), x, use_reentrant=self.reentrant)
        return x


def two(structure, reentrant=False):
    model = Recomputes(reentrant)
    for seed, name in enumerate(("de", "fr")):
        adapter = fs.adapt(model, structure, r"layers\.\d", (), name)
        stir(adapter.parameters(), seed)
    return model, adapter, torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def gradients(loss, adapter):
    return torch.autograd.grad(loss, adapter.parameters())


@every_structure
def test_changing_what_is_active_before_the_backward_pass_is_refused(structure):
    """Without this the gradients would be those of another adapter, and nobody would know."""
    model, adapter, x = two(structure)
    wanted = gradients(model(x).square().sum(), adapter)
    for change in (lambda: fs.activate(model, "de"), lambda: setattr(adapter, "scale", 0.5)):
        loss = model(x).square().sum()
        change()
        with pytest.raises(StateError, match="what is active has changed since the forward pass"):
            gradients(loss, adapter)
        fs.activate(model, "fr")
        adapter.scale = 1.0
    for a, b in zip(gradients(model(x).square().sum(), adapter), wanted):
        assert relative(a, b) < 1e-6


@every_structure
def test_rows_reach_into_the_backward_pass_only_inside_their_block(structure):
    model, adapter, x = two(structure)
    names = ["fr", None, "de"]
    with fs.rows(model, names):
        loss = model(x).square().sum()
        got = gradients(loss, adapter)
        outside = model(x).square().sum()
    with pytest.raises(StateError, match=r"inside rows\(\)"):
        gradients(outside, adapter)
    for a, b in zip(got, gradients(model(x).square()[:1].sum(), adapter)):
        assert relative(a, b) < 1e-5


@every_structure
def test_a_look_at_the_base_between_forward_and_backward_is_fine(structure):
    model, adapter, x = two(structure)
    wanted = gradients(model(x).square().sum(), adapter)
    loss = model(x).square().sum()
    with torch.no_grad(), fs.disabled(model):
        model(x)
    with torch.no_grad(), fs.rows(model, ["de", None, None]):
        model(x)
    for a, b in zip(gradients(loss, adapter), wanted):
        assert relative(a, b) < 1e-6


@every_structure
def test_reentrant_checkpointing_gives_the_same_gradients(structure):
    model, adapter, x = two(structure)
    wanted = gradients(model(x).square().sum(), adapter)
    model.reentrant = True
    for _ in range(2):
        (loss := model(x.requires_grad_()).square().sum()).backward()
        with torch.no_grad():
            torch.testing.assert_close(model(x).square().sum(), loss)
        for p, b in zip(adapter.parameters(), wanted):
            assert relative(p.grad, b) < 1e-5
            p.grad = None


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_transformers_own_checkpointing(reentrant):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = hugging("BertForSequenceClassification", "BertConfig", **SIZE, **still)().train()
    adapter = fs.adapt(model, fs.LSR(rank=4, separation_rank=3), "attention", ("classifier",))
    stir(adapter.parameters())

    def grown():
        model.zero_grad()
        model(words(), labels=torch.arange(3) % 2).loss.backward()
        return [p.grad.clone() for p in adapter.parameters()]

    wanted = grown()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for a, b in zip(grown(), wanted):
        assert relative(a, b) < 1e-5
