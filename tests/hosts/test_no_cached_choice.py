"""Nothing on a layer remembers how an update was multiplied: what is changed later is seen."""

import copy
import dataclasses
import pickle

import pytest
import torch
from places import set_gain
from suite import (
    adapted,
    batch,
    by_definition,
    draw,
    net,
    one_of_each_kind,
    relative,
    stir,
    stirred,
    twin,
)
from torch import nn
from torch.func import functional_call

import finespun as fs
from finespun import hosts

KINDS = ("lora", "lsr", "map", "through", "around", "bank", "entries", "direct", "delta")
COMPILED = ("lora", "lsr", "through", "bank", "map")
LAYER = "blocks.0.up"


def weights_alone(case):
    """Cases whose update goes into a weight."""
    return not case.block


kinds = one_of_each_kind(weights_alone, KINDS)
modes = pytest.mark.parametrize("grad", [True, False], ids=["gradients", "none"])


@pytest.fixture(params=[True, False], ids=["gradients", "none"])
def made(request):
    """Makes a model that has run, its adapter, and the plain model, in one mode of gradients."""
    with torch.set_grad_enabled(request.param):

        def make(case):
            plain = net()
            model, adapter = stirred(case, twin(plain))
            model(batch())
            return plain, model, adapter

        yield make


def close(case, got, wanted):
    return relative(got, wanted) <= max(case.tolerance, 2e-6)


@kinds
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_choices_of_its_own(case, made, copied):
    plain, model, _ = made(case)
    x, y = batch(), model(batch())
    other = copied(model)
    assert torch.equal(other(x), y)
    theirs = fs.Adapter(other, "default")
    stir(theirs.parameters(), seed=8)
    assert torch.equal(model(x), y)
    assert close(case, other(x), by_definition(plain, theirs, x))
    assert relative(other(x), y) > 1e-4
    next(iter(theirs.deltas.values())).register_forward_hook(lambda d, a, out: 0 * out)
    assert torch.equal(model(x), y)


@kinds
def test_a_forward_hook_of_the_user_acts_and_goes(case, made):
    plain, model, adapter = made(case)
    x, y, delta = batch(), model(batch()), adapter.deltas[LAYER]
    h = torch.randn(4, 24)
    layer, bare = model.get_submodule(LAYER), plain.get_submodule(LAYER)
    seen = []
    handle = delta.register_forward_hook(lambda d, args, out: seen.append(out) or 3 * out)
    moved = delta.bias_change()
    wanted = bare(h) + 3 * delta.forward(h) + (0 if moved is None else moved)
    assert close(case, layer(h), wanted)
    assert len(seen) == 1
    handle.remove()
    assert torch.equal(model(x), y)


@kinds
def test_a_hook_before_forward_acts_and_goes(case, made):
    plain, model, adapter = made(case)
    y, delta, h = model(batch()), adapter.deltas[LAYER], torch.randn(4, 24)
    layer, bare = model.get_submodule(LAYER), plain.get_submodule(LAYER)
    handle = delta.register_forward_pre_hook(lambda d, args: (0 * args[0],))
    moved = delta.bias_change()
    assert close(case, layer(h), bare(h) + (0 if moved is None else moved))
    handle.remove()
    assert torch.equal(model(batch()), y)


@kinds
@pytest.mark.parametrize("everywhere", [True, False], ids=["global", "own"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_backward_hooks_of_the_user_are_called(case, everywhere, before):
    model, adapter = stirred(case, net())
    delta, x = adapter.deltas[LAYER], batch().requires_grad_()
    inputs = [x, *adapter.parameters()]
    wanted = torch.autograd.grad(model(x).square().sum(), inputs)
    torch_module, calls = nn.modules.module, []

    def watch(module, *_):
        calls.append(module)

    place = torch_module if everywhere else delta
    name = f"register_{'module_' * everywhere}full_backward_{'pre_' * before}hook"
    handle = getattr(place, name)(watch)
    try:
        got = torch.autograd.grad(model(x).square().sum(), inputs)
    finally:
        handle.remove()
    assert sum(module is delta for module in calls) == 1
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    model(x).square().sum().backward()
    assert sum(module is delta for module in calls) == 1


@kinds
def test_global_forward_hooks_see_the_update(case, made):
    _, model, adapter = made(case)
    delta, y, calls = adapter.deltas[LAYER], model(batch()), []
    for register in ("register_module_forward_hook", "register_module_forward_pre_hook"):
        handle = getattr(nn.modules.module, register)(lambda module, *_: calls.append(module))
        try:
            assert close(case, model(batch()), y)
        finally:
            handle.remove()
        assert sum(module is delta for module in calls) == 1
        calls.clear()
    assert torch.equal(model(batch()), y)
    assert calls == []


@kinds
def test_a_replaced_parameter_is_multiplied(case, made):
    plain, model, adapter = made(case)
    y, delta = model(batch()), adapter.deltas[LAYER]
    owner = delta if list(delta.trained_parameters()) else delta.bank
    for name, parameter in list(owner.named_parameters()):
        module = owner.get_submodule(name.rpartition(".")[0])
        moved = parameter.detach() * 1.3 + 0.3 * draw(*parameter.shape, seed=8)
        module.register_parameter(name.rpartition(".")[2], nn.Parameter(moved))
    assert close(case, model(batch()), by_definition(plain, adapter, batch()))
    assert relative(model(batch()), y) > 1e-4


@kinds
def test_a_replaced_weight_is_the_base(case, made):
    plain, model, adapter = made(case)
    y = model(batch())
    fresh = torch.randn_like(plain.get_submodule(LAYER).weight) / 5
    for one in (plain, model):
        one.get_submodule(LAYER).weight = nn.Parameter(fresh.clone(), requires_grad=False)
    assert close(case, model(batch()), by_definition(plain, adapter, batch()))
    assert relative(model(batch()), y) > 1e-3


@kinds
def test_a_replaced_forward_of_the_layer_goes_around_the_adapted_one(case, made):
    _, model, _ = made(case)
    layer, h = model.get_submodule(LAYER), torch.randn(4, 24)
    y, own = layer(h), layer.forward
    layer.forward = lambda z: own(z) + 1
    assert torch.equal(layer(h), y + 1)
    del layer.forward
    assert torch.equal(layer(h), y)


@kinds
def test_a_forward_of_the_update_s_own_is_called(case, made):
    plain, model, adapter = made(case)
    delta, h = adapter.deltas[LAYER], torch.randn(4, 24)
    layer, bare = model.get_submodule(LAYER), plain.get_submodule(LAYER)
    y, moved = layer(h), delta.bias_change()
    delta.forward = lambda x: x.new_zeros(*x.shape[:-1], 40)
    assert close(case, layer(h), bare(h) + (0 if moved is None else moved))
    del delta.forward
    assert torch.equal(layer(h), y)


@kinds
def test_training_mode_of_the_update_alone_drops(case, made):
    case = copy.copy(case)
    object.__setattr__(case, "structure", dataclasses.replace(case.structure, dropout=0.5))
    _, model, adapter = made(case)
    y, delta = model(batch()), adapter.deltas[LAYER]
    delta.train()
    assert not torch.equal(model(batch()), model(batch()))
    delta.eval()
    assert torch.equal(model(batch()), y)


@kinds
def test_functional_call_multiplies_what_it_is_given(case, made):
    """Twice with other tensors, each gone before the next: memory and identity may be the same."""
    plain, model, adapter = made(case)
    x, y = batch(), model(batch())
    names = {id(p): n for n, p in model.named_parameters()}
    mine = {names[id(p)]: p for p in adapter.parameters()}
    for factor in (0.7, 1.4, 0.2):
        other = copy.deepcopy(model)
        theirs = fs.Adapter(other, "default")
        with torch.no_grad():
            for p in theirs.parameters():
                p.mul_(factor)
        given = {n: p.detach() * factor for n, p in mine.items()}
        got = functional_call(model, given, (x,))
        del given
        assert close(case, got, by_definition(plain, theirs, x)), factor
    assert torch.equal(model(x), y)


# --- compiled graphs ------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@one_of_each_kind(weights_alone, COMPILED, 0.1)
def test_swap_gain_and_activation_compile_nothing_anew(case):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, adapter = adapted(case)
    fast, x = torch.compile(model, backend="eager"), batch()
    host = hosts.hosts_of(model)[LAYER]
    set_gain(host, None)

    def graphs():
        fast(x)
        return counters["stats"]["unique_graphs"]

    def other(seed):
        stir(adapter.parameters(), seed)
        found = {k: v.clone() for k, v in adapter.attached.tensors().items()}
        return lambda: adapter.attached.load(found)

    first, second = other(3), other(4)
    before = graphs()
    for swap in (first, second, first):
        swap()
        assert graphs() == before
        assert close(case, fast(x), model(x))
    set_gain(host, torch.full((40,), 0.5))
    gained = graphs()
    for value in (0.25, 2.0):
        set_gain(host, torch.full((40,), value))
        assert graphs() == gained
    set_gain(host, None)
    assert graphs() == gained
    fs.activate(model, None)
    off = graphs()
    for wanted in ("default", None, "default"):
        fs.activate(model, wanted)
        assert graphs() == off
        assert close(case, fast(x), model(x))
    torch._dynamo.reset()
