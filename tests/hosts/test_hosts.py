"""The shared suite, part two: an adapter in a model: identity, paths, gradients, coming off."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from suite import (
    CASES,
    DEVICE,
    WIDTH,
    adapted,
    batch,
    by_definition,
    bytes_of,
    draw,
    every,
    net,
    relative,
    same,
    stir,
    stirred,
    twin,
)
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.adapters.keys import Key
from finespun.adapters.packed import PackedTensors
from finespun.errors import InputError, StateError, TargetError
from finespun.hosts.paths import watched


def trained(adapter):
    """Name -> number of everything that training moves."""
    found = {f"{n}/{k}": p for n, d in adapter.deltas.items() for k, p in d.named_parameters()}
    bank = adapter.attached.bank
    found |= {f"bank/{k}": p for k, p in bank.named_parameters()} if bank else {}
    found |= {
        f"{n}/{k}": p for n, m in adapter.attached.copies.items() for k, p in m.named_parameters()
    }
    return {k: p for k, p in found.items() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every(lambda case: case.zero)
def test_step_zero_changes_nothing_bit_for_bit(case, dtype):
    x, plain = batch(dtype=dtype), net(dtype)
    wanted = plain(x)
    model, adapter = adapted(case, plain)
    assert torch.equal(model(x), wanted)
    assert torch.equal(model.train()(x), wanted)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


@every()
def test_every_path_gives_the_definition(case):
    """Fused kernel, one product for all layers, `through`, the dense form and a watched delta."""
    plain, x = net(), batch()
    model, adapter = stirred(case, twin(plain))
    wanted = by_definition(
        twin(plain).double(), twin(adapter.model.double()) and adapter, x.double()
    )
    adapter.model.float()
    assert relative(model(x), wanted) <= case.tolerance
    assert relative(model(x), plain(x)) > 1e-3
    with torch.no_grad():
        assert relative(model(x), wanted) <= case.tolerance
    handles = [d.register_forward_hook(lambda *_: None) for d in adapter.deltas.values()]
    assert all(watched(d) for d in adapter.deltas.values())
    assert relative(model(x), wanted) <= case.tolerance
    for handle in handles:
        handle.remove()
    adapter.attached.factor_cache = None
    assert relative(model(x), wanted) <= case.tolerance


@every()
def test_strength_scales_the_update(case):
    plain, x = net(), batch()
    model, adapter = stirred(case, twin(plain))
    wanted = by_definition(plain, adapter, x, strength=0.3)
    adapter.scale = 0.5
    fs.activate(model, {"default": 0.6})
    assert relative(model(x), wanted) <= case.tolerance
    adapter.scale = 0.0
    assert torch.equal(model(x), plain(x))
    with pytest.raises(InputError, match="nan"):
        adapter.scale = float("nan")


@every()
def test_gradients_are_those_of_the_definition(case):
    plain = net(torch.float64)
    model, adapter = stirred(case, twin(plain), ("head",))
    model.double()
    for mode in (model.eval(), model.train()):
        x = batch(dtype=torch.float64).requires_grad_()
        goal = draw(6, 5, seed=9, dtype=torch.float64)
        wanted = by_definition(plain, adapter, x)
        numbers = trained(adapter)
        targets = [x, *numbers.values()]
        expected = torch.autograd.grad((wanted * goal).sum(), targets)
        got = torch.autograd.grad((mode(x) * goal).sum(), targets)
        for name, a, b in zip(["x", *numbers], got, expected):
            assert relative(a, b) <= 1e-10, name


@every()
def test_dropout_acts_on_the_input_of_the_update_only(case):
    """y − base(x) has mean ΔW x + Δb and variance p/(1 − p) Σ_i ΔW_i² x_i²."""
    p, rows = 0.4, 20_000
    case = dataclasses.replace(case, structure=dataclasses.replace(case.structure, dropout=p))
    plain, x = net(), batch()
    model, adapter = stirred(case, twin(plain))
    assert torch.equal(model(x), model(x))
    name, delta = next(iter(adapter.deltas.items()))
    module, h = plain.get_submodule(name), draw(WIDTH, seed=8).expand(rows, WIDTH)
    model.train()
    with torch.no_grad():
        change = model.get_submodule(name)(h) - module(h)
        update, moved = delta(torch.eye(WIDTH, device=DEVICE)), delta.bias_change()
    mean = h[0] @ update + (0.0 if moved is None else moved)
    variance = p / (1 - p) * h[0].square() @ update.square()
    assert ((change.mean(0) - mean).abs() <= 5 * (variance / rows).sqrt()).all()
    assert relative(change.var(0), variance) < 0.05


@every()
def test_gain_scales_what_reaches_the_numbers_only(case):
    plain, x = net(), batch().requires_grad_()
    model, adapter = stirred(case, plain)
    numbers = trained(adapter)
    y = model(x)
    before = torch.autograd.grad(y.square().sum(), [x, *numbers.values()])
    for host in hosts.hosts_of(model).values():
        host.slots.put("gain", "default", "test", torch.tensor(0.25, device=DEVICE))
    z = model(x)
    after = torch.autograd.grad(z.square().sum(), [x, *numbers.values()])
    assert relative(z, y) <= case.tolerance
    assert relative(after[0], before[0]) <= 1e-5
    for name, a, b in zip(numbers, after[1:], before[1:]):
        assert relative(a, 0.25 * b) <= 1e-5, name


@every()
def test_gain_may_differ_by_output(case):
    model, adapter = stirred(case, net())
    name = next(iter(adapter.deltas))
    host, x = hosts.hosts_of(model)[name], draw(7, WIDTH, seed=8)
    weights = torch.linspace(0.1, 2.0, host.shape.out_features, device=DEVICE)
    numbers = [p for p in trained(adapter).values() if p.requires_grad]
    goal = draw(7, host.shape.out_features, seed=4)
    layer = model.get_submodule(name)
    expected = torch.autograd.grad(
        (layer(x) * goal * weights).sum(), numbers, allow_unused=True, materialize_grads=True
    )
    host.slots.put("gain", "default", "test", weights)
    got = torch.autograd.grad(
        (layer(x) * goal).sum(), numbers, allow_unused=True, materialize_grads=True
    )
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every()
def test_an_overlay_is_added_and_nothing_else(case):
    model, adapter = stirred(case, net())
    x, before = batch(), bytes_of(model)
    y = model(x)
    host = next(iter(hosts.hosts_of(model).values()))
    noise = draw(host.shape.out_features, host.shape.in_features, seed=3) / 50
    host.slots.put("overlay", "default", "test", lambda h: F.linear(h, noise))
    assert relative(model(x), y) > 1e-4
    assert same(bytes_of(model), before)
    with adapter.disabled():
        off = model(x)
    host.slots.free("test")
    assert torch.equal(model(x), y)
    with adapter.disabled():
        assert torch.equal(model(x), off)


@every()
def test_disabled_is_the_base_bit_for_bit(case):
    plain, x = net(), batch()
    model, adapter = stirred(case, twin(plain), ("head",))
    wanted, y = plain(x), model(x)
    with adapter.disabled():
        assert torch.equal(model(x), wanted)
    assert torch.equal(model(x), y)
    with pytest.raises(RuntimeError, match="boom"), adapter.disabled():
        raise RuntimeError("boom")
    assert torch.equal(model(x), y)


@every()
def test_a_trained_head_is_chosen_by_activation(case):
    plain, x = net(), batch()
    model, adapter = stirred(case, twin(plain), ("head",))
    assert relative(model(x), by_definition(plain, adapter, x)) <= case.tolerance
    assert adapter.num_module_parameters == WIDTH * 5 + 5
    assert torch.equal(model.head.weight, plain.head.weight)
    fs.activate(model, None)
    assert torch.equal(model(x), plain(x))


@every()
def test_detach_leaves_the_model_as_it_was(case):
    plain = net()
    for p in plain.blocks[0].parameters():
        p.requires_grad_(False)
    before = {n: (id(p), p.requires_grad) for n, p in plain.named_parameters()}
    classes = {n: type(m) for n, m in plain.named_modules()}
    names, tensors = set(plain.__dict__), bytes_of(plain)
    model, adapter = stirred(case, plain, ("head",))
    assert {n: isinstance(m, classes[n]) for n, m in model.named_modules() if n in classes} == (
        dict.fromkeys(classes, True)
    )
    kept = {k: v for k, v in bytes_of(model).items() if k in tensors}
    assert same(kept, tensors)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(
        map(id, adapter.parameters())
    )
    model(batch()).sum().backward()
    adapter.detach()
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before
    assert set(model.__dict__) == names
    assert all("_finespun" not in m.__dict__ for m in model.modules())
    assert same(bytes_of(model), tensors)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@every()
def test_two_adapters_come_and_go(case):
    plain, x = net(), batch()
    model, first = stirred(case, twin(plain), name="first")
    alone = model(x)
    _, second = stirred(case, model, name="second")
    assert relative(model(x), alone) > 1e-4
    second.detach()
    first.activate()
    assert relative(model(x), alone) <= case.tolerance
    first.detach()
    assert torch.equal(model(x), plain(x))


@every()
def test_tensors_go_out_and_come_back(case):
    model, adapter = stirred(case, net(), ("head",))
    x = batch()
    y, saved = model(x), {k: v.clone() for k, v in adapter.attached.tensors().items()}
    packed = PackedTensors.pack(saved)
    assert same(packed, saved)
    assert all(slot.offset % 16 == 0 for slot in packed.table.values())
    stir(adapter.parameters(), seed=40)
    assert relative(model(x), y) > 1e-4
    adapter.attached.load(packed)
    assert torch.equal(model(x), y)
    fs.activate(model, None)
    fs.evict(model, "default")
    assert not hosts.adapter_set_of(model).attached
    assert not any("deltas" in k or "copies" in k or "bank" in k for k in model.state_dict())
    assert same(adapter.attached.tensors(), saved)
    adapter.activate()
    assert torch.equal(model(x), y)


@every()
def test_a_wrong_tensor_is_named_and_nothing_is_written(case):
    model, adapter = stirred(case, net())
    before = bytes_of(model)
    saved = {k: v.clone() for k, v in adapter.attached.tensors().items()}
    key = next(iter(saved))
    with pytest.raises(InputError, match=f"{key}.*missing"):
        adapter.attached.load({k: v for k, v in saved.items() if k != key})
    with pytest.raises(InputError, match=r"odd.*belongs to nothing"):
        adapter.attached.load({**saved, Key("site", "odd", "A"): saved[key]})
    with pytest.raises(InputError, match=f"{key}.*expected"):
        adapter.attached.load({**saved, key: torch.zeros(99)})
    assert same(bytes_of(model), before)


def test_evicting_what_is_active_is_refused():
    model, _ = adapted(CASES[0], net())
    with pytest.raises(StateError, match="active"):
        fs.evict(model, "default")


def test_a_failed_attachment_leaves_the_model_alone():
    plain = net()
    before, classes = bytes_of(plain), [type(m) for m in plain.modules()]
    for targets, train, error in (
        (["qurey"], (), TargetError),
        (["norm"], (), TargetError),
        (["up"], ("haed",), TargetError),
        ("all-linear(", (), TargetError),
    ):
        with pytest.raises(error):
            fs.adapt(plain, fs.LoRA(rank=2), targets, train)
    with pytest.raises(InputError, match="rank=30"):
        fs.adapt(plain, fs.LoRA(rank=30), ["up"], ())
    assert same(bytes_of(plain), before)
    assert [type(m) for m in plain.modules()] == classes
    assert "_finespun_adapters" not in plain.__dict__
    assert all(p.requires_grad for p in plain.parameters())


def test_fast_path_bypasses_are_refused():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 1)
    for target in ("out_proj", "linear1"):
        with pytest.raises(TargetError, match="fast path"):
            fs.adapt(model, fs.LoRA(rank=2), [target], ())
