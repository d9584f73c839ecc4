"""Gradients of base weights before training: against autograd, one weight at a time."""

import os

os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

import pytest
import torch
from suite import DEVICE, batch, bytes_of, draw, net, same, stir
from torch import nn
from torch.utils.checkpoint import checkpoint

import finespun as fs
from finespun.driver import estimate_gradients
from finespun.errors import InputError, TargetError, TrainingError

SITES = ("blocks.0.up", "blocks.1.down")


def squared(model, pair):
    """The mean squared error of one batch."""
    return (model(pair[0]) - pair[1]).square().mean()


def pairs(count=3, dtype=torch.float64, rows=6):
    return [
        (batch(rows, dtype, seed=i), draw(rows, 5, seed=50 + i, dtype=dtype)) for i in range(count)
    ]


def by_autograd(model, sites, batches):
    weights = [model.get_parameter(f"{s}.weight").requires_grad_() for s in sites]
    loss = torch.stack([squared(model, b) for b in batches]).mean()
    return dict(zip(sites, torch.autograd.grad(loss, weights)))


def test_it_is_autograds_gradient():
    found = estimate_gradients(net(torch.float64), SITES, pairs(), squared)
    wanted = by_autograd(net(torch.float64), SITES, pairs())
    for name, G in found.items():
        torch.testing.assert_close(G, wanted[name], rtol=1e-12, atol=1e-15)


def test_batches_count_by_their_weight():
    """Short batches pull a mean of means: arXiv 2407.05000's code takes that."""
    sizes = (1, 2, 5)
    batches = [pairs(rows=n)[i] for i, n in enumerate(sizes)]
    whole = [tuple(torch.cat(parts) for parts in zip(*batches))]
    found = estimate_gradients(
        net(torch.float64), SITES, batches, lambda m, b: (squared(m, b), len(b[0]))
    )
    wanted = by_autograd(net(torch.float64), SITES, whole)
    plain = estimate_gradients(net(torch.float64), SITES, batches, squared)
    for name, G in found.items():
        torch.testing.assert_close(G, wanted[name])
        assert not torch.allclose(plain[name], wanted[name], rtol=1e-2)


@pytest.mark.parametrize("stirred", [False, True])
def test_the_model_is_its_base_meanwhile_and_stays_what_it_was(stirred):
    model = net(torch.float64)
    adapter = fs.adapt(model, fs.LoRA(rank=3), ["up", "down"], ("head",))
    if stirred:
        stir(adapter.parameters())
    kept = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    model.extra = kept
    before, asked = bytes_of(model), {n: p.requires_grad for n, p in model.named_parameters()}
    objects = {n: id(p) for n, p in model.named_parameters()}
    y = model(pairs()[0][0])
    found = estimate_gradients(model, SITES, pairs(), squared)
    wanted = by_autograd(net(torch.float64), SITES, pairs())
    for name, G in found.items():
        torch.testing.assert_close(G, wanted[name])
    assert same(bytes_of(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == asked
    assert {n: id(p) for n, p in model.named_parameters()} == objects
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(pairs()[0][0]), y)


def test_an_error_on_the_way_leaves_no_trace():
    model = net()
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}

    def breaks(model, pair):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        estimate_gradients(model, SITES, pairs(dtype=torch.float32), breaks)
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before


def test_one_weights_gradient_lives_at_a_time(monkeypatch):
    """Twelve layers: at every hand-over no other gradient exists, and none is left."""
    layers = [nn.Linear(16, 16) for _ in range(12)]
    model = nn.Sequential(*layers)
    alive, most = set(), []
    real = nn.Parameter.register_post_accumulate_grad_hook

    def spy(parameter, hook):
        def around(p):
            alive.add(id(p))
            most.append(len(alive))
            hook(p)
            assert p.grad is None
            alive.discard(id(p))

        return real(parameter, around)

    monkeypatch.setattr(nn.Parameter, "register_post_accumulate_grad_hook", spy)
    data = [(draw(3, 16), draw(3, 16, seed=1))]
    found = estimate_gradients(model, [str(i) for i in range(12)], data * 2, squared)
    assert most == [1] * 24
    assert all(p.grad is None for p in model.parameters())
    assert all(G.abs().max() > 0 for G in found.values())


def test_sums_are_at_least_float32():
    found = estimate_gradients(
        net(torch.bfloat16), SITES, pairs(dtype=torch.bfloat16), squared, device="cpu"
    )
    assert all(G.dtype == torch.float32 and G.device.type == "cpu" for G in found.values())


def language_model(cls, config):
    torch.manual_seed(0)
    return cls(config).double().eval()


def causal(model, ids):
    return model(input_ids=ids, labels=ids).loss


def test_a_tied_weight_counts_by_the_use_that_was_named():
    """Both uses in one gradient are what an update at one of them cannot follow."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config.tie_word_embeddings = True
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    sites = ("lm_head", "model.embed_tokens")
    tied, plain = (language_model(LlamaForCausalLM, config) for _ in range(2))
    found = estimate_gradients(tied, sites, [ids], causal)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    uses = plain.lm_head.weight, plain.model.embed_tokens.weight
    head, table = torch.autograd.grad(causal(plain, ids), uses)
    torch.testing.assert_close(found["lm_head"], head)
    torch.testing.assert_close(found["model.embed_tokens"], table.T)


def test_transposed_layers_and_parts_of_fused_ones():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    model = language_model(GPT2LMHeadModel, config)
    name = "transformer.h.0.attn.c_attn"
    found = estimate_gradients(model, [f"{name}:q", f"{name}:v"], [ids], causal)
    weight = model.get_parameter(f"{name}.weight").requires_grad_()
    (G,) = torch.autograd.grad(causal(model, ids), weight)
    torch.testing.assert_close(found[f"{name}:q"], G.T[:16])
    torch.testing.assert_close(found[f"{name}:v"], G.T[32:])


def test_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5)).double()
    data = [(draw(2, 3, 6, 6, dtype=torch.float64), draw(2, 5, seed=1, dtype=torch.float64))]
    model(data[0][0])
    found = estimate_gradients(model, ["0"], data, squared)["0"]
    (G,) = torch.autograd.grad(squared(model, data[0]), model[0].weight)
    torch.testing.assert_close(found, G.flatten(1))


def nf4(model):
    """The same model with bitsandbytes' 4-bit weights in layers 0 and 2."""
    import bitsandbytes as bnb

    for i in (0, 2):
        plain = model[i]
        model[i] = bnb.nn.Linear4bit(
            plain.in_features, plain.out_features, compute_dtype=torch.float32, quant_type="nf4"
        )
        model[i].load_state_dict(plain.state_dict())
    return model.to("cpu")


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 192), nn.Tanh(), nn.Linear(192, 64))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_recomputed_layers_count_once(reentrant, quantised):
    model = nf4(two_layers()) if quantised else two_layers()
    data = [(draw(4, 128, seed=i), draw(4, 64, seed=9 + i)) for i in range(2)]

    def recomputed(model, pair):
        x = pair[0].clone().requires_grad_()
        return (checkpoint(model, x, use_reentrant=reentrant) - pair[1]).square().mean()

    one = estimate_gradients(model, ["0", "2"], data, squared)
    two = estimate_gradients(model, ["0", "2"], data, recomputed)
    for name, G in one.items():
        torch.testing.assert_close(two[name], G)


def test_a_quantised_weights_gradient_is_that_of_what_it_stands_for():
    import bitsandbytes as bnb

    model, twin = nf4(two_layers()), two_layers()
    for i in (0, 2):
        weight = model[i].weight
        twin[i].weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    data = [(draw(4, 128, seed=i), draw(4, 64, seed=9 + i)) for i in range(2)]
    found = estimate_gradients(model, ["0", "2"], data, squared)
    loss = torch.stack([squared(twin, b) for b in data]).mean()
    wanted = torch.autograd.grad(loss, [twin[0].weight, twin[2].weight])
    for G, W in zip(found.values(), wanted):
        torch.testing.assert_close(G, W, rtol=1e-4, atol=1e-6)
    assert not model[0]._forward_hooks


def test_a_layer_that_never_ran_has_no_gradient():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    found = estimate_gradients(Idle(), ["used", "idle"], [(draw(2, 4), draw(2, 3))], squared)
    assert found["idle"].abs().max() == 0
    assert found["used"].abs().max() > 0


def test_what_cannot_be_is_named():
    model, data = net(), pairs(dtype=torch.float32)
    with pytest.raises(InputError, match="no batches"):
        estimate_gradients(model, SITES, [], squared)
    with pytest.raises(TargetError, match=r"'blocks\.0\.upp'.*nearest: 'blocks\.0\.up'"):
        estimate_gradients(model, ["blocks.0.upp"], data, squared)
    with pytest.raises(InputError, match="0-d tensor that depends on the sites"):
        estimate_gradients(model, SITES, data, lambda m, b: squared(m, b).item())
    with pytest.raises(InputError, match="0-d tensor that depends on the sites"):
        estimate_gradients(model, SITES, data, lambda m, b: torch.ones((), device=DEVICE))
    with pytest.raises(InputError, match=r"weight 0\.0.*positive"):
        estimate_gradients(model, SITES, data, lambda m, b: (squared(m, b), 0.0))
    with pytest.raises(TrainingError, match="the loss is nan"):
        estimate_gradients(model, SITES, data, lambda m, b: squared(m, b) * float("nan"))
