"""Sparse updates inside the base weights: switched on and off, and trained there."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peers import Sizes
from suite import batch, by_definition, bytes_of, draw, net, relative, same, stir
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import finespun as fs
from finespun import hosts
from finespun.driver import Driver, in_place, start_from_gradients
from finespun.errors import StateError
from finespun.hosts import merging

SPARSE = fs.make("shira", rank=1)
SNIP = fs.make("shira", rank=1, mask="snip")
SITES = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")]


def squared(model, pair):
    return (model(pair[0]) - pair[1]).square().mean()


def pairs(count, dtype=torch.float64):
    return [(batch(6, dtype, seed=i), draw(6, 5, seed=50 + i, dtype=dtype)) for i in range(count)]


def adapted(structure=SPARSE, dtype=torch.float32, moved=True, name="default", model=None):
    model = net(dtype) if model is None else model
    adapter = fs.adapt(model, structure, SITES, (), name)
    for delta in adapter.deltas.values():
        delta.to(torch.promote_types(dtype, torch.float32))
    if moved:
        stir(adapter.parameters(), seed=len(name))
    return model, adapter


def weights(model):
    return {s: model.get_parameter(f"{s}.weight").detach().clone() for s in SITES}


# --- switching -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_switches_leave_no_trace(dtype):
    model, adapter = adapted(dtype=dtype)
    before, places = bytes_of(model), {s: model.get_parameter(f"{s}.weight") for s in SITES}
    where = {s: p.data_ptr() for s, p in places.items()}
    wanted = {
        s: (before[f"{s}.weight"].float() + d.dense(d.base_weight())).to(dtype)
        for s, d in adapter.deltas.items()
    }
    for _ in range(100):
        kept = adapter.merge(undo="entries")
        for s, W in weights(model).items():
            assert torch.equal(W, wanted[s])
        adapter.unmerge()
    assert same(bytes_of(model), before)
    assert {s: model.get_parameter(f"{s}.weight").data_ptr() for s in SITES} == where
    assert kept == adapter.num_update_parameters * (8 + 2 * dtype.itemsize)


def test_adding_and_taking_off_a_lora_in_half_precision_leaves_one():
    """What switching of entries is for: in bf16 W + B A − B A is not W."""
    model, _ = adapted(fs.LoRA(rank=1), torch.bfloat16)
    before = bytes_of(model)
    for strength in (1.0, -1.0):
        hosts.merge(model, {"default": strength}, undo="none")
        hosts.adapter_set_of(model).merged = {}
    assert not same(bytes_of(model), before)


@pytest.mark.parametrize("undo", ["memory", "entries", "none"])
@pytest.mark.parametrize("weights", [{"one": 1.0}, {"one": 0.7, "two": -0.4}])
def test_fused_adapters_are_their_weighted_sum(undo, weights):
    model, one = adapted(name="one")
    _, two = adapted(SNIP, moved=False, name="two", model=model)
    fs.activate(model, None)
    start_from_gradients(model, "two", pairs(2, torch.float32), squared)
    stir(two.parameters(), seed=9)
    one.scale = 0.5
    plain, before = net(), bytes_of(model)
    own = {"one": (one, 0.5), "two": (two, 1.0)}
    hosts.merge(model, weights, undo)
    for s in SITES:
        W = plain.get_parameter(f"{s}.weight").detach()
        for name, c in weights.items():
            adapter, scale = own[name]
            W = W + c * scale * adapter.deltas[s].delta(W).detach()
        assert relative(model.get_parameter(f"{s}.weight"), W) <= 1e-7
    if undo != "none":
        hosts.unmerge(model)
        assert same(bytes_of(model), before)


def test_a_merged_weights_original_is_still_read():
    """An adapter that looks at W0 sees it, whatever entries are switched on."""
    model, _ = adapted()
    fs.adapt(model, fs.make("dora", rank=2), SITES, (), "dora")
    stir(hosts.adapter_set_of(model)["dora"].deltas[SITES[0]].parameters())
    fs.activate(model, {"default": 1.0, "dora": 1.0})
    y, before = model(batch()), weights(model)
    hosts.merge(model, {"default": 1.0}, undo="entries")
    for host in hosts.hosts_of(model).values():
        assert torch.equal(host.weight(), before[host.name])
    torch.testing.assert_close(model(batch()), y)
    with fs.disabled(model):
        assert same(weights(model), before)
    assert not same(weights(model), before)
    torch.testing.assert_close(model(batch()), y)


def test_parts_transposed_layers_and_convolutions_are_switched():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict(
        {"fused": nn.Linear(16, 48), "turned": Conv1D(20, 16), "conv": nn.Conv2d(4, 8, 3)}
    )
    before = bytes_of(model)
    adapter = fs.adapt(model, SPARSE, ["fused:q", "fused:v", "turned", "conv"], ())
    stir(adapter.parameters())
    own = {n: model.get_parameter(f"{n}.weight").detach().clone() for n in model if "." not in n}
    adapter.merge(undo="entries")
    split = [adapter.deltas[f"fused:{p}"].delta(own["fused"][:16]).detach() for p in "qv"]
    moved = torch.cat([split[0], torch.zeros(16, 16), split[1]])
    torch.testing.assert_close(model.fused.weight.detach(), own["fused"] + moved)
    change = adapter.deltas["turned"].delta(own["turned"].T).detach()
    torch.testing.assert_close(model.turned.weight.detach(), own["turned"] + change.T)
    change = adapter.deltas["conv"].delta(own["conv"].flatten(1)).detach()
    torch.testing.assert_close(model.conv.weight.detach(), own["conv"] + change.view(8, 4, 3, 3))
    adapter.unmerge()
    adapter.detach()
    assert same(bytes_of(model), before)


class Ops(TorchDispatchMode):
    """Names of the operations that read or write entries, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "index" in func.__name__ or "scatter" in func.__name__ or "clone" in func.__name__:
            self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_each_entry_is_read_once_and_written_once_each_way():
    _, adapter = adapted()
    with Ops() as on:
        adapter.merge(undo="entries")
    assert on.names == ["index_select", "index_copy_"] * len(SITES)
    with Ops() as off:
        adapter.unmerge()
    assert off.names == ["index_select", "index_copy_"] * len(SITES)


def test_half_a_switch_is_taken_back(monkeypatch):
    model, adapter = adapted()
    before, real, calls = bytes_of(model), merging.write_entries, []

    def breaks(W, index, values):
        calls.append(index)
        real(W, index, values)
        if len(calls) == 3:
            raise RuntimeError("out of luck")

    monkeypatch.setattr(merging, "write_entries", breaks)
    with pytest.raises(RuntimeError, match="out of luck"):
        adapter.merge(undo="entries")
    assert same(bytes_of(model), before)
    assert not hosts.adapter_set_of(model).merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_of_what_is_merged_is_noticed(dtype):
    """Were the old entries put back, half of the edit would be lost silently."""
    model, adapter = adapted(dtype=dtype)
    adapter.merge(undo="entries")
    last = model.get_parameter(f"{SITES[-1]}.weight")
    merged = bytes_of(model)
    last.data.add_(1)
    edited = bytes_of(model)
    assert not same(edited, merged)
    with pytest.raises(StateError, match=r"'blocks\.1\.down' was edited while default is merged"):
        adapter.unmerge()
    with pytest.raises(StateError, match="Undo the edit"), adapter.disabled():
        pass
    assert same(bytes_of(model), edited)
    assert hosts.adapter_set_of(model).merged == {"default": 1.0}
    last.data.copy_(merged[f"{SITES[-1]}.weight"])
    adapter.unmerge()
    assert same(weights(model), weights(net(dtype)))


def test_an_edit_beside_the_entries_stays():
    model, adapter = adapted()
    adapter.merge(undo="entries")
    site, wanted = SITES[0], weights(net())
    index = adapter.deltas[site].index
    beside = min(set(range(wanted[site].numel())) - set(index.tolist()))
    for W in (model.get_parameter(f"{site}.weight").data, wanted[site]):
        W.view(-1)[beside] = 3.0
    adapter.unmerge()
    assert same(weights(model), wanted)


def test_copies_other_precisions_and_what_is_no_number_are_no_edit():
    model, adapter = adapted()
    at = int(adapter.deltas[SITES[0]].index[0])
    model.get_parameter(f"{SITES[0]}.weight").data.view(-1)[at] = float("nan")
    before = {name: W.nan_to_num(7.0) for name, W in weights(model).items()}
    adapter.merge(undo="entries")
    twin = copy.deepcopy(model)
    fs.Adapter(twin, "default").unmerge()
    assert same({name: W.nan_to_num(7.0) for name, W in weights(twin).items()}, before)
    hosts.unmerge(model.to(torch.bfloat16))
    found = {name: W.nan_to_num(7.0) for name, W in weights(model).items()}
    assert same(found, {name: W.to(torch.bfloat16) for name, W in before.items()})


def test_only_few_entries_can_be_switched():
    model, adapter = adapted(fs.LoRA(rank=1))
    before = bytes_of(model)
    with pytest.raises(StateError, match=r"LoRADelta at 'blocks\.0\.up' is not; try undo='memory'"):
        adapter.merge(undo="entries")
    assert same(bytes_of(model), before)


# --- training ------------------------------------------------------------------------------------
def trained(way, steps=20):
    """Twenty steps of SGD in float64: the trained values of every site, and the last output."""
    model, adapter = adapted(SNIP, torch.float64, moved=False)
    start_from_gradients(model, "default", pairs(2), squared)
    places = {s: d.index for s, d in adapter.deltas.items()}
    plain = {s: model.get_parameter(f"{s}.weight") for s in SITES}
    start = weights(model)
    if way == "masked":
        fs.activate(model, None)
        numbers = [p.requires_grad_() for p in plain.values()]
    else:
        numbers = adapter.parameters()
    optimizer = torch.optim.SGD(numbers, lr=0.05, momentum=0.9)
    with in_place(model, "default") if way == "inside" else nullcontext():
        for data in pairs(steps):
            optimizer.zero_grad()
            squared(model.train(), data).backward()
            if way == "masked":
                for s, p in plain.items():
                    kept = torch.zeros(p.numel(), dtype=p.dtype).index_fill_(0, places[s], 1)
                    p.grad.mul_(kept.view_as(p))
            optimizer.step()
        y = model(pairs(1)[0][0]).detach()
        moved = {s: (p.detach() - start[s]).flatten() for s, p in plain.items()}
    if way == "masked":
        return {s: move[places[s]] for s, move in moved.items()}, y
    assert same(weights(model), start)
    assert all(bool(move.any()) == (way == "inside") for move in moved.values())
    return {s: d.v.detach() for s, d in adapter.deltas.items()}, y


def test_three_ways_of_training_are_one():
    added, y = trained("added")
    for way in ("masked", "inside"):
        values, z = trained(way)
        torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-12)
        for s in SITES:
            assert added[s].abs().min() > 0
            torch.testing.assert_close(values[s], added[s], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_entries_change_and_come_back(dtype):
    model, adapter = adapted(dtype=dtype, moved=False)
    before = weights(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    with in_place(model, "default"):
        driver = Driver(model, "default", optimizer)
        for data in pairs(5, dtype):
            optimizer.zero_grad()
            squared(model.train(), data).backward()
            optimizer.step()
        driver.close()
        model(pairs(1, dtype)[0][0])
        for s, W in weights(model).items():
            delta = adapter.deltas[s]
            moved = torch.zeros(W.numel(), dtype=torch.bool)
            moved[delta.index] = True
            assert torch.equal(W.flatten()[~moved], before[s].flatten()[~moved])
            wanted = before[s].flatten()[moved].float() + delta.v.detach()
            assert torch.equal(W.flatten()[moved], wanted.to(dtype))
            assert delta.v.dtype == torch.float32
    assert same(weights(model), before)
    assert all(d.v.detach().abs().max() > 0 for d in adapter.deltas.values())


def test_inside_and_beside_are_one_function():
    model, adapter = adapted(dtype=torch.float64)
    adapter.scale, x = 0.5, batch(dtype=torch.float64)

    def gradients():
        y = model(x)
        found = torch.autograd.grad(y.square().sum(), adapter.parameters())
        return y.detach(), found

    y, beside = gradients()
    with in_place(model, "default"):
        z, inside = gradients()
        with fs.disabled(model):
            assert torch.equal(model(x), net(torch.float64)(x))
        again, _ = gradients()
    torch.testing.assert_close(z, y)
    assert torch.equal(z, again)
    for a, b in zip(inside, beside):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(z, by_definition(net(torch.float64), adapter, x, 0.5))
    assert torch.equal(gradients()[0], y)


def test_a_step_makes_nothing_of_the_weights_size():
    """Counted: dense training makes ΔW and its gradient, this one neither."""
    layer = nn.Linear(64, 64, bias=False)
    model = nn.Sequential(layer)
    adapter = fs.adapt(model, SPARSE, ["0"], ())
    stir(adapter.parameters())
    x = draw(5, 64)
    with in_place(model, "default"):
        model(x).square().sum().backward()
        with Sizes() as sizes:
            model(x).square().sum().backward()
    assert max(sizes.found) < 64 * 64
    assert adapter.deltas["0"].v.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_learn_once(reentrant):
    model, adapter = adapted(dtype=torch.float64)
    x = batch(dtype=torch.float64).requires_grad_()
    with in_place(model, "default"):
        wanted = torch.autograd.grad(model(x).square().sum(), adapter.parameters())
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for p, grad in zip(adapter.parameters(), wanted):
        torch.testing.assert_close(p.grad, grad)


def test_every_way_out_restores_the_base():
    model, adapter = adapted()
    before, y = bytes_of(model), model(batch())

    def breaks():
        with in_place(model, "default"):
            model(batch())
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        breaks()
    assert same(bytes_of(model), before)
    with in_place(model, "default"):
        adapter.unmerge()
        assert same(bytes_of(model), before)
        assert relative(model(batch()), y) <= 1e-6
    assert same(bytes_of(model), before)
    assert all(not h.slots.overlays for h in hosts.hosts_of(model).values())
    assert not any(model.get_submodule(s)._forward_pre_hooks for s in SITES)
    with in_place(model, "default"), pytest.raises(StateError, match="is merged; unmerge it"):
        adapter.detach()
    adapter.detach()
    assert same(weights(model), weights(net()))


def test_saved_inside_and_loaded_beside(tmp_path):
    model, adapter = adapted()
    with in_place(model, "default"):
        y = model(batch())
        adapter.save(tmp_path)
    other = net()
    fs.load(other, tmp_path)
    torch.testing.assert_close(other(batch()), y)


def test_what_cannot_be_trained_inside_is_named():
    model, _ = adapted(fs.LoRA(rank=1))
    with (
        pytest.raises(StateError, match=r"LoRADelta at 'blocks\.0\.up' is not"),
        in_place(model, "default"),
    ):
        pass
    model, _ = adapted()
    fs.activate(model, None)
    with pytest.raises(StateError, match="'default' is not active"), in_place(model, "default"):
        pass
    conv = nn.Sequential(nn.Conv2d(4, 8, 3))
    fs.adapt(conv, SPARSE, ["0"], ())
    with (
        pytest.raises(StateError, match="'0' is a conv: it cannot be trained in place"),
        in_place(conv, "default"),
    ):
        pass
    model, _ = adapted(SNIP, moved=False)
    start_from_gradients(model, "default", pairs(2, torch.float32), squared)
    with in_place(model, "default"):
        model(batch())
        start_from_gradients(model, "default", pairs(2, torch.float32), squared)
        with pytest.raises(StateError, match="its entries changed while trained in place"):
            model(batch())
    assert same(weights(model), weights(net()))


def test_gradient_masks_are_chosen_for_every_site():
    model, adapter = adapted(SNIP, torch.float64, moved=False)
    start_from_gradients(model, "default", pairs(3), squared)
    plain = net(torch.float64)
    own = [plain.get_parameter(f"{s}.weight").requires_grad_() for s in SITES]
    loss = torch.stack([squared(plain, p) for p in pairs(3)]).mean()
    for s, W, G in zip(SITES, own, torch.autograd.grad(loss, own)):
        delta = adapter.deltas[s]
        best = (W * G).detach().abs().flatten().topk(len(delta.v)).indices
        assert set(delta.index.tolist()) == set(best.tolist())
    with pytest.raises(StateError, match="LoRADelta does not start from gradients"):
        start_from_gradients(
            adapted(fs.LoRA(rank=1))[0], "default", pairs(1, torch.float32), squared
        )
