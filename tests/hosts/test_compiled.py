"""Compiled and exported models: one graph, and another adapter in it without compiling again."""

import copy

import pytest
import torch
from suite import relative, stir
from tiny import DECODER, FAMILIES, built, hugging, words

import finespun as fs
from finespun.errors import BaseMismatch, InputError, StateError

pytestmark = pytest.mark.slow

LSR = fs.LSR(rank=4, separation_rank=3)


def llama():
    """A tiny Llama of one layer, the same numbers every time."""
    torch.manual_seed(0)
    return hugging(
        "LlamaForCausalLM", "LlamaConfig", **{**DECODER, "num_hidden_layers": 1}
    )().eval()


def saved(folder, seed, structure=LSR, targets="all-linear"):
    """An adapter on disk, and the outputs that it gives."""
    model = llama()
    adapter = fs.adapt(model, structure, targets, name=f"n{seed}")
    stir(adapter.parameters(), seed)
    adapter.save(folder / str(seed))
    with torch.no_grad():
        return model(words()).logits


@pytest.fixture
def compiled():
    """A model and its compiled twin; a break of the graph is an error."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = llama()
    yield model, torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.reset()


def graphs():
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_hot_swap_compiles_once(tmp_path, compiled):
    model, fast = compiled
    wanted = [saved(tmp_path, seed) for seed in range(5)]
    adapter = fs.load(model, tmp_path / "0", name="served")
    identity = [id(p) for p in adapter.parameters()]
    for seed in (0, 1, 2, 3, 4, 1):
        adapter.swap(tmp_path / str(seed))
        assert relative(fast(words()).logits, wanted[seed]) < 1e-5
        assert graphs() == 1
    assert [id(p) for p in adapter.parameters()] == identity


@torch.no_grad()
def test_switching_compiles_once_for_each_adapter(tmp_path, compiled):
    model, fast = compiled
    wanted = [saved(tmp_path, seed) for seed in range(3)]
    for seed in range(3):
        fs.load(model, tmp_path / str(seed))
    for seed in (0, 1, 2, 1, 0):
        fs.activate(model, f"n{seed}")
        assert relative(fast(words()).logits, wanted[seed]) < 1e-5
    assert graphs() <= 3


def test_swapping_keeps_the_optimiser_and_refuses_what_differs(tmp_path):
    for seed in (0, 1):
        saved(tmp_path, seed)
    model = llama()
    adapter = fs.load(model, tmp_path / "0", trainable=True)
    before = [p.detach().clone() for p in adapter.parameters()]
    saved(tmp_path, 7, fs.LSR(rank=2, separation_rank=3))
    saved(tmp_path, 8, fs.LoRA(rank=4))
    saved(tmp_path, 9, LSR, "attention")
    for other in ("7", "8", "9"):
        with pytest.raises(InputError, match="not that of 'n0'"):
            adapter.swap(tmp_path / other)
    adapter.merge()
    with pytest.raises(StateError, match="'n0' is merged"):
        adapter.swap(tmp_path / "1")
    adapter.unmerge()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0 if p.dim() == 2 and not p.requires_grad else 0.0)
    with pytest.raises(BaseMismatch):
        adapter.swap(tmp_path / "1")
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), before))
    optimizer = torch.optim.AdamW(adapter.parameters(), 0.01)
    adapter.swap(tmp_path / "1", force=True)
    start = [p.detach().clone() for p in adapter.parameters()]
    model(words()).logits.square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(start, before))
    assert not any(torch.equal(a, b) for a, b in zip(adapter.parameters(), start))


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_an_exported_program_gives_the_adapted_outputs(family):
    model = built(family)
    key = "pixel_values" if family == "vit" else "input_ids"
    y0 = FAMILIES[family].call(model).detach()
    adapter = fs.adapt(model, LSR, "attention", ())
    stir(adapter.parameters())
    y = FAMILIES[family].call(model).detach()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(**{key: x}).logits

    x = words() if key == "input_ids" else torch.randn(2, 3, 8, 8)
    program = torch.export.export(Logits(), (x,))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert relative(program.module()(x), copied(**{key: x}).logits) < 1e-5
        adapter.detach()
        assert relative(program.module()(x), copied(**{key: x}).logits) < 1e-5
    assert relative(y, y0) > 1e-3
