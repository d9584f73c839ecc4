"""LoR2C's spans: bypasses around several blocks, in a forward pass."""

import copy
import pickle
import threading

import pytest
import torch
from bypasses import BLOCKS, Stack, adapted, around, by_hand
from peers import largest_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import finespun as fs
from finespun.errors import PlanError, StateError
from finespun.hosts import link
from finespun.methods.allocation.merge_inject import neighbours
from finespun.methods.structures import LoR2C


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "spans", [{"layer_0": (0, 2)}, {"layer_2": (0, 2), "layer_1": (1, 3)}, {"layer_3": (1, 1)}]
)
def test_a_span_reads_at_its_first_block_and_adds_at_its_last(share, spans):
    model, adapter = adapted(LoR2C(rank=2, share=share), BLOCKS)
    plain, x = Stack(), torch.randn(3, 5, 8)
    plain.load_state_dict(model.state_dict(), strict=False)
    around(adapter, **spans)
    with torch.no_grad():
        wanted = by_hand(plain, adapter, x)
        assert (model(x) - wanted).norm() <= 1e-6 * wanted.norm()
        assert (plain(x) - wanted).norm() > 1e-2
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.layer))):
        layers = copied.layer if isinstance(copied, Stack) else copied
        assert layers[0] is not model.layer[0]
    torch.testing.assert_close(copy.deepcopy(model)(x), wanted)


def test_gradients_through_a_span_are_autograd_s():
    model, adapter = adapted(LoR2C(rank=2), BLOCKS)
    plain, x = Stack(), torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    plain.load_state_dict(model.state_dict(), strict=False)
    around(adapter, layer_1=(0, 2), layer_2=(2, 3))
    model.double(), plain.double()
    targets = [x, *adapter.parameters()]
    got = torch.autograd.grad(model(x).square().sum(), targets)
    wanted = torch.autograd.grad(by_hand(plain, adapter, x).square().sum(), targets)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def grads(model, adapter, *inputs):
    """Gradients of the sum over several forwards, all of them before the first backward."""
    for p in adapter.parameters():
        p.grad = None
    losses = [model(x).square().sum() for x in inputs]
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in adapter.parameters()]


def test_recomputed_activations_give_the_same_gradients():
    model, adapter = adapted(LoR2C(rank=2), BLOCKS)
    around(adapter, layer_0=(0, 2), layer_2=(1, 3))
    inputs = [torch.randn(3, 5, 8, requires_grad=True) for _ in range(2)]
    wanted = grads(model, adapter, *inputs)
    model.how = lambda layer, h: checkpoint(layer, h, use_reentrant=False)
    for a, b in zip(grads(model, adapter, *inputs), wanted):
        torch.testing.assert_close(a, b)
    waiting = [
        k
        for h in fs.hosts.hosts_of(model).values()
        for s in h.ends["default"]
        for k in s.now.values()
    ]
    assert not any(isinstance(k, torch.Tensor) or k() is not None for k in waiting)
    model.how = lambda layer, h: checkpoint(layer, h, use_reentrant=True)
    with pytest.raises(StateError, match=r"'layer.1'.*use_reentrant=False"):
        grads(model, adapter, inputs[0])


SIZE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def decoder():
    """A tiny Llama with one bypass around all its blocks."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZE, num_key_value_heads=1, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config)
    adapter = fs.adapt(model, LoR2C(rank=2), r"model\.layers\.\d", train_modules=())
    for delta in adapter.deltas.values():
        nn.init.normal_(delta.B)
    names = list(adapter.deltas)
    adapter.attached.plan = adapter.attached.plan.choose(names[0], span=[names[0], names[2]])
    link(adapter.name, adapter.attached.plan, adapter.deltas)
    return model, adapter, torch.arange(21).view(3, 7) + 3


def test_transformers_checkpointing_gives_the_same_gradients():
    model, adapter, ids = decoder()
    found = []
    for _ in range(2):
        losses = [model.train()(input_ids=ids, labels=ids + i).loss for i in range(2)]
        found.append([torch.autograd.grad(loss, adapter.parameters()) for loss in losses])
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for plain, recomputed in zip(*found):
        for a, b in zip(plain, recomputed):
            torch.testing.assert_close(b, a)


def test_generation_is_the_same_with_and_without_a_cache():
    model, _, ids = decoder()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    with_cache, without = (
        model.eval().generate(ids, use_cache=cache, **options) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_a_span_that_cannot_know_its_input_is_refused():
    model, adapter = adapted(LoR2C(rank=2), BLOCKS)
    around(adapter, layer_0=(0, 2))
    with pytest.raises(StateError, match=r"'layer.0'.*not run before"):
        model.layer[2](torch.randn(3, 8))
    model.layer[0](torch.randn(4, 8))
    with pytest.raises(StateError, match=r"\(3, 8\).*was given \(4, 8\)"):
        model.layer[2](torch.randn(3, 8))
    with pytest.raises(PlanError, match=r"'layer.9'.*nearest"):
        around(adapter, layer_0=(0, 9))
    for wrong in (3, ["layer.0"], "layer.0"):
        with pytest.raises(PlanError, match="a first and a last block"):
            link("default", adapter.attached.plan.choose("layer.0", span=wrong), adapter.deltas)


def test_a_block_that_runs_twice_is_bypassed_twice():
    """As in ALBERT, where one block stands for all layers."""
    model, adapter = adapted(LoR2C(rank=2), ["layer.0"], depth=1)
    plain, x = Stack(depth=1), torch.randn(3, 8)
    plain.load_state_dict(model.state_dict(), strict=False)
    (delta,) = adapter.deltas.values()
    update = (delta.scale * delta.B @ delta.A).T
    wanted = plain(x) + x @ update
    wanted = plain(wanted) + wanted @ update
    torch.testing.assert_close(model(model(x)), wanted)
    assert neighbours(adapter.attached) == []


def test_no_matrix_of_the_width_is_made():
    """The published code keeps and multiplies a zero matrix of the hidden size for each bypass."""
    model, adapter = adapted(LoR2C(rank=2), BLOCKS, width=64)
    around(adapter, layer_0=(0, 2))
    x = torch.randn(5, 64)
    for layer in model.layer:
        layer.query, layer.value = nn.Identity(), nn.Identity()
    assert largest_tensor(lambda: model(x).square().sum().backward()) == 5 * 64
    assert all(
        t.numel() <= 2 * 64 for d in adapter.deltas.values() for t in d.state_dict().values()
    )


def test_spans_serve_rows_and_threads_apart():
    model, adapter = adapted(LoR2C(rank=2), BLOCKS)
    around(adapter, layer_0=(0, 2))
    x = torch.randn(4, 5, 8)
    with adapter.disabled():
        base = model(x)
    whole = model(x)
    with fs.rows(model, ["default", None, None, "default"]):
        mixed = model(x)
    torch.testing.assert_close(mixed[[0, 3]], whole[[0, 3]])
    torch.testing.assert_close(mixed[[1, 2]], base[[1, 2]])
    results = {}
    inputs = {i: torch.randn(3, 5, 8) for i in range(4)}
    wanted = {i: model(v).detach() for i, v in inputs.items()}
    meet = threading.Barrier(4)
    model.how = lambda layer, h: (meet.wait(), layer(h))[1]

    def run(i):
        results[i] = model(inputs[i]).detach()

    threads = [threading.Thread(target=run, args=(i,)) for i in inputs]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(torch.equal(results[i], wanted[i]) for i in inputs)


@pytest.mark.slow
def test_a_span_compiles_in_one_graph():
    model, adapter = adapted(LoR2C(rank=2), BLOCKS)
    around(adapter, layer_0=(0, 2))
    x = torch.randn(3, 5, 8)
    wanted = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), wanted)
