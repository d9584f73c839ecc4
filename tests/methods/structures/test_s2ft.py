"""S2FT against its definition, masked full training and the facts of arXiv 2412.06289."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import built, moved, rank, site, update
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import finespun as fs
from finespun.contract import Coupling, SiteShape, TensorSite
from finespun.driver import estimate_gradients, in_place, mean_activations
from finespun.errors import InputError, PlanError
from finespun.methods.structures import S2FT


class Feedforward(nn.Module):
    """up, GELU, down, with biases: a block whose hidden channels are coupled."""

    def __init__(self, width=12, hidden=40, out=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out or width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def feedforward(seed=0, dtype=torch.float64, **sizes):
    torch.manual_seed(seed)
    return Feedforward(**sizes).to(dtype)


def inputs(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coupled(name, out, inner, side, units, kind="channels", parts=1, seed=7, block="block"):
    """A site whose rows (side "out") or columns belong to the units of a block."""
    value = inputs(out, inner, seed=seed)
    return TensorSite(name, value, coupling=Coupling(block, side, units, kind, parts))


def trained_lines(delta):
    """Rows, or columns, of ΔW that are not zero."""
    return update(delta).abs().sum(1 - delta.dim).nonzero()[:, 0].tolist()


# --- the update ----------------------------------------------------------------------------------
@pytest.mark.parametrize("outputs", [(), ("site",)])
@given(out=st.integers(1, 12), inner=st.integers(1, 12), share=st.floats(0.01, 1.0))
@settings(max_examples=40, deadline=None)
def test_chosen_lines_move_and_no_others(outputs, out, inner, share):
    form, where = S2FT(channels=share, outputs=outputs), site(out, inner)
    (delta,) = moved(form, where)
    assert trained_lines(delta) == delta.lines.tolist() == sorted(set(delta.lines.tolist()))
    size = out if outputs else inner
    assert len(delta.lines) == max(1, int(share * size + 1e-9))
    assert (
        delta.D.numel()
        == form.num_parameters(where.shape)
        == form.total_parameters(form.plan([where]))
    )
    for shape in ((inner,), (3, inner), (2, 3, inner)):
        x = inputs(*shape)
        torch.testing.assert_close(delta(x), x @ update(delta).T)
    at, values = delta.sparse()
    assert at.tolist() == sorted(at.tolist())
    dense = torch.zeros(out * inner, dtype=torch.float64).index_copy(0, at, values.detach())
    assert torch.equal(dense.view(out, inner), update(delta))


@pytest.mark.parametrize("outputs", [(), ("site",)])
def test_the_gradient_is_the_dense_one_at_the_lines(outputs):
    where = site(30, 20)
    (delta,) = moved(S2FT(channels=0.2, outputs=outputs), where)
    x, G = inputs(4, 5, 20).requires_grad_(), inputs(4, 5, 30, seed=2)
    dD, dx = torch.autograd.grad((delta(x) * G).sum(), [delta.D, x])
    dense = torch.einsum("bto,bti->oi", G, x.detach())
    torch.testing.assert_close(dD, dense.index_select(delta.dim, delta.lines))
    torch.testing.assert_close(dx, G @ update(delta))


def test_an_export_has_one_place_in_each_row():
    columns, rows = moved(S2FT(channels=0.2, outputs=("b",)), site(30, 20, "a"), site(30, 20, "b"))
    A, B = columns.low_rank()
    assert torch.equal(A, torch.eye(20, dtype=A.dtype)[columns.lines])
    assert B is columns.D
    A, B = rows.low_rank()
    assert A is rows.D
    assert torch.equal(B, torch.eye(30, dtype=B.dtype)[:, rows.lines])
    assert (rank(columns), rank(rows)) == (4, 6)
    assert columns.scale == rows.scale == 1.0


def test_the_base_products_output_is_not_written_to():
    (delta,) = moved(S2FT(channels=0.2, outputs=("site",)), site(30, 20))
    x, y = inputs(3, 20), inputs(3, 30, seed=2)
    before = y.clone()
    torch.testing.assert_close(delta.through(x, lambda _: y), before + x @ update(delta).T)
    assert torch.equal(y, before)


# --- what is skipped -----------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_backward_costs_the_slice_alone(side):
    """Three products of the slice beside the base's two; the base's weight gradient, a third of
    full training's operations, is not made."""
    T, n, s = 16, 40, 8
    layer = nn.Sequential(nn.Linear(n, n, bias=False))
    x = torch.randn(2, T // 2, n, requires_grad=True)

    def operations():
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        return counter.get_total_flops()

    assert operations() == 3 * 2 * T * n * n
    outputs = ("0",) if side == "rows" else ()
    adapter = fs.adapt(layer, S2FT(channels=s / n, outputs=outputs), ["0"], ())
    assert operations() == 2 * 2 * T * n * n + 3 * 2 * T * s * n
    shape = SiteShape("0", n, n)
    assert adapter.structure.flops(shape, T) == 2 * T * s * n


def kept(layer, x):
    """Bytes of the activations that autograd keeps for the backward pass, by last dimension."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()}
    numbers = [t for t in found.values() if t.is_floating_point() and t.data_ptr() not in own]
    return {t.shape[-1]: t.untyped_storage().nbytes() for t in numbers}


def test_only_the_slice_of_the_input_is_kept():
    layer, x = nn.Sequential(nn.Linear(40, 24)), torch.randn(2, 8, 40).requires_grad_()
    assert kept(layer, x) == {40: x.nbytes}
    adapter = fs.adapt(layer, S2FT(channels=0.1), ["0"], ())
    assert kept(layer, x) == {4: x.nbytes // 10}
    adapter.deltas["0"].stand(torch.arange(4))
    assert kept(layer, x) == {4: x.nbytes // 10}


def test_a_layer_that_writes_keeps_its_input_once():
    layer, x = nn.Sequential(nn.Linear(24, 40)), torch.randn(2, 8, 24).requires_grad_()
    fs.adapt(layer, S2FT(channels=0.1, outputs=("0",)), ["0"], ())
    assert kept(layer, x) == {24: x.nbytes, 4: 16 * 4 * 4}


# --- training ------------------------------------------------------------------------------------
def masked_training(model, deltas, optimizer, pairs):
    """Full training whose gradients outside the chosen lines are dropped."""
    weights = {n: model.get_parameter(f"{n}.weight").requires_grad_() for n in deltas}
    masks = {
        n: torch.zeros_like(w).index_fill(deltas[n].dim, deltas[n].lines, 1)
        for n, w in weights.items()
    }
    steps = optimizer(list(weights.values()))
    for x, y in pairs:
        steps.zero_grad()
        (model(x) - y).square().mean().backward()
        for n, w in weights.items():
            w.grad *= masks[n]
        steps.step()


def in_place_training(model, deltas, rate, pairs):
    """The chosen lines of W themselves are the parameters; gradients are made for them alone."""
    model.requires_grad_(False)
    for x, y in pairs:
        own = {n: model.get_submodule(n).weight for n in deltas}
        lines = {
            n: w.index_select(deltas[n].dim, deltas[n].lines).requires_grad_()
            for n, w in own.items()
        }
        whole = {
            f"{n}.weight": w.index_copy(deltas[n].dim, deltas[n].lines, lines[n])
            for n, w in own.items()
        }
        loss = (torch.func.functional_call(model, whole, (x,)) - y).square().mean()
        moves = torch.autograd.grad(loss, list(lines.values()))
        for (n, w), move in zip(own.items(), moves):
            w.data.index_add_(deltas[n].dim, deltas[n].lines, move, alpha=-rate)


def test_three_ways_of_training_agree():
    """Deltas, the slices in place, and masked full training: the same weights after 20 steps."""
    pairs = [(inputs(16, 12, seed=i), inputs(16, 12, seed=90 + i)) for i in range(20)]
    model, masked, placed = feedforward(), feedforward(), feedforward()
    adapter = fs.adapt(model, S2FT(channels=0.2), ["fc1", "fc2"], ())
    for delta in adapter.deltas.values():
        delta.double()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for x, y in pairs:
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    masked_training(masked, adapter.deltas, lambda p: torch.optim.SGD(p, lr=0.1), pairs)
    in_place_training(placed, adapter.deltas, 0.1, pairs)
    for name, delta in adapter.deltas.items():
        W0 = feedforward().get_submodule(name).weight.detach()
        mine = delta.map_weight(W0).detach()
        for other in (masked, placed):
            theirs = other.get_submodule(name).weight.detach()
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
        assert float((mine - W0).norm()) > 0.01


def test_training_inside_the_base_is_training():
    """`in_place` knows an update of few entries, not the method: one product, and it is undone."""
    pairs = [(inputs(16, 12, seed=i), inputs(16, 12, seed=90 + i)) for i in range(20)]
    found = {}
    for inside in (False, True):
        model = feedforward()
        adapter = fs.adapt(model, S2FT(channels=0.2), ["fc1", "fc2"], ())
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        with in_place(model, "default") if inside else contextlib.nullcontext():
            for x, y in pairs:
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
        found[inside] = [p.detach() for p in adapter.parameters()]
        assert torch.equal(model.fc2.weight, feedforward().fc2.weight)
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert float(a.norm()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_switches_leave_no_trace(dtype):
    """Only the chosen lines are written, and what stood there is put back."""
    model = feedforward(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    adapters = [
        fs.adapt(model, S2FT(channels=0.2, seed=i), ["fc1", "fc2"], (), f"a{i}") for i in range(2)
    ]
    for step in range(50):
        for adapter in adapters:
            for p in adapter.parameters():
                nn.init.normal_(p)
            adapter.activate()
            kept = adapter.merge(0.1 * step, undo="entries")
            assert kept == adapter.num_update_parameters * (8 + 2 * dtype.itemsize)
            adapter.unmerge()
    assert all(torch.equal(model.get_parameter(n), p) for n, p in before.items())
    assert all(model.get_parameter(n).is_leaf for n in before)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_chosen_never_moves(decay, dtype):
    """The official optimiser decays the whole weight, frozen part included."""
    model = feedforward(dtype=dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = fs.adapt(model, S2FT(channels=0.1), ["fc1", "fc2"], ())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=decay)
    x, y = inputs(16, 12, dtype=dtype), inputs(16, 12, seed=3, dtype=dtype)
    for _ in range(50):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    adapter.merge()
    deltas = adapter.deltas
    for name, dim in (("fc1", 0), ("fc2", 1)):
        rest = torch.ones(before[f"{name}.weight"].shape[dim], dtype=torch.bool)
        rest[deltas[name].lines] = False
        rest, chosen = rest.nonzero()[:, 0], deltas[name].lines
        W, W0 = model.get_parameter(f"{name}.weight"), before[f"{name}.weight"]
        assert torch.equal(W.index_select(dim, rest), W0.index_select(dim, rest))
        wanted = (W0.float().index_select(dim, chosen) + deltas[name].D.detach()).to(dtype)
        assert torch.equal(W.index_select(dim, chosen), wanted)
        assert bool((wanted != W0.index_select(dim, chosen)).any())
        assert torch.equal(model.get_parameter(f"{name}.bias"), before[f"{name}.bias"])
    adapter.unmerge()
    assert all(torch.equal(model.get_parameter(n), p) for n, p in before.items())


def test_gradients_add_up_over_batches():
    """The official optimiser reads the last batch's gradient only."""
    model, x, y = feedforward(), inputs(8, 12), inputs(8, 12, seed=2)
    adapter = fs.adapt(model, S2FT(channels=0.1), ["fc1", "fc2"], ())
    (model(x) - y).square().sum().backward()
    whole = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    for part in (slice(0, 3), slice(3, 8)):
        (model(x[part]) - y[part]).square().sum().backward()
    for p, wanted in zip(adapter.parameters(), whole):
        torch.testing.assert_close(p.grad, wanted)


def test_tuning_the_second_layer_follows_a_shifted_teacher():
    """A trained GELU network; its teacher's second layer moves by rank 2; 576 parameters tuned."""
    torch.manual_seed(0)
    teacher, model = (feedforward(i, torch.float32, width=32, hidden=256) for i in (1, 2))

    def train(parameters, rate, steps):
        optimizer = torch.optim.Adam(parameters, lr=rate)
        for step in range(steps):
            x = inputs(64, 32, seed=step, dtype=torch.float32)
            loss = (model(x) - teacher(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def error():
        x = inputs(2000, 32, seed=10**6, dtype=torch.float32)
        with torch.no_grad():
            return float((model(x) - teacher(x)).square().mean())

    train(model.parameters(), 3e-3, 400)
    with torch.no_grad():
        teacher.fc2.weight += 0.05 * torch.randn(32, 2) @ torch.randn(2, 256)
    before, W0 = error(), model.fc2.weight.detach().clone()
    adapter = fs.adapt(model, S2FT(channels=18 / 256), ["fc2"], ())
    assert adapter.num_update_parameters == 576
    train(adapter.parameters(), 1e-2, 600)
    assert error() <= 0.85 * before
    adapter.merge()
    assert float((model.fc2.weight != W0).float().mean()) <= 18 / 256


# --- which units ---------------------------------------------------------------------------------
def test_layers_of_a_block_train_the_same_units():
    form = S2FT(channels=0.1, heads=0.5)
    up = coupled("up", 40, 12, "out", 40)
    down = coupled("down", 12, 40, "in", 40)
    v = coupled("v", 12, 12, "out", 4, "heads", block="attention")
    o = coupled("o", 12, 12, "in", 4, "heads", block="attention")
    up, down, v, o = moved(form, up, down, v, o)
    assert trained_lines(up) == trained_lines(down)
    assert len(up.lines) == 4
    assert trained_lines(v) == trained_lines(o)
    heads = v.lines.view(2, 3)
    assert torch.equal(heads, heads[:, :1] + torch.arange(3))
    assert (heads[:, 0] % 3).tolist() == [0, 0]


def test_query_heads_are_chosen_alone_unless_values_are_trained_too():
    """Four query heads to each of two key-value heads, three features a head."""
    o = coupled("o", 24, 24, "in", 2, "heads", 4)
    v = coupled("v", 6, 24, "out", 2, "heads", 1)
    form = S2FT(heads=0.125)
    (alone,), _, plan = built(form, o)
    assert len(alone.lines) == 3
    assert plan.choices["o"]["of"] == 8
    with_values, values = built(form, o, v)[0]
    assert len(with_values.lines) == 12
    assert (with_values.lines // 12).unique().tolist() == (values.lines // 3).unique().tolist()


def test_counts_of_llama_2_7b_as_published():
    """53 heads and 7,045 channels, drawn over 32 layers: 56,643,584 parameters."""
    layers = []
    for i in range(32):
        meta = torch.empty(4096, 4096, device="meta"), torch.empty(4096, 11008, device="meta")
        heads = Coupling(f"{i}.attn", "in", 32, "heads")
        layers.append(TensorSite(f"{i}.attn.o", meta[0], coupling=heads))
        channels = Coupling(f"{i}.mlp", "in", 11008)
        layers.append(TensorSite(f"{i}.mlp.down", meta[1], coupling=channels))
    form = S2FT(channels=0.02, heads=0.052, per_layer=False)
    plan = form.plan(layers)
    chosen = {
        kind: sum(len(c["units"]) for n, c in plan.choices.items() if kind in n)
        for kind in ("attn", "mlp")
    }
    assert chosen == {"attn": 53, "mlp": 7045}
    assert form.total_parameters(plan) == 56_643_584
    none = [s.shape for s in layers if s.shape not in plan.sites]
    assert all(s.name.endswith("attn.o") for s in none)
    even = S2FT(channels=0.02, heads=0.052)
    assert even.total_parameters(even.plan(layers)) == 32 * 4096 * (128 + 220)


@pytest.mark.parametrize("per_layer", [True, False])
def test_a_plan_does_not_hang_on_the_order_of_layers(per_layer):
    layers = [coupled(f"l{i}", 10, 20, "in", 20, block=f"b{i}") for i in range(6)]
    form = S2FT(channels=0.1, per_layer=per_layer)
    plan, turned = form.plan(layers), form.plan(layers[::-1])
    assert plan.choices == turned.choices
    sizes = [len(plan.choices.get(f"l{i}", {"units": []})["units"]) for i in range(6)]
    assert sum(sizes) == 12
    assert (set(sizes) == {2}) == per_layer
    assert len({tuple(c["units"]) for c in plan.choices.values()}) > 1
    assert (
        form.plan(layers).choices
        != S2FT(channels=0.1, per_layer=per_layer, seed=1).plan(layers).choices
    )


def test_what_a_seed_draws_never_changes():
    plan = S2FT(channels=0.1, heads=0.25).plan(
        [coupled("down", 4, 40, "in", 40), coupled("o", 4, 16, "in", 8, "heads", block="attention")]
    )
    assert plan.choices["down"]["units"] == [2, 12, 24, 27]
    assert plan.choices["o"]["units"] == [1, 4]


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("select", ["weight", "activation", "gradient", "product"])
def test_units_are_those_of_largest_or_smallest_score(select, largest):
    """Weight norm W, activation A or gradient G as scores, and W·A, over all layers of a block."""
    up, down = coupled("up", 20, 6, "out", 10, seed=1), coupled("down", 5, 20, "in", 10, seed=2)
    scores = {"up": inputs(20, seed=3).abs(), "down": inputs(20, seed=4).abs()}
    W = [w.view(10, 2).sum(1) for w in (up.value.square().sum(1), down.value.square().sum(0))]
    S = [scores[n].square().view(10, 2).sum(1) for n in ("up", "down")]
    total = {"weight": sum(W), "product": W[0] * S[0] + W[1] * S[1]}.get(select, sum(S))
    wanted = total.topk(3, largest=largest).indices.sort().values.tolist()
    form = S2FT(channels=0.3, select=select, largest=largest)
    for given_scores in (scores, {"up": S[0].sqrt(), "down": S[1].sqrt()}):
        plan = form.plan([up, down], given_scores)
        assert plan.choices["up"]["units"] == plan.choices["down"]["units"] == wanted


def test_gradients_of_the_base_choose_units():
    """The rule G: estimated on the model, handed over, chosen by the norm of each unit's slices."""
    model, pairs = feedforward(), [(inputs(8, 12, seed=i), inputs(8, 12, seed=9)) for i in range(3)]

    def loss(m, pair):
        return (m(pair[0]) - pair[1]).square().mean()

    G = estimate_gradients(model, ["fc1", "fc2"], pairs, loss)
    form = S2FT(channels=0.1, select="gradient")
    adapter = fs.adapt(model, form, ["fc1", "fc2"], (), scores=G)
    size = G["fc1"].square().sum(1) + G["fc2"].square().sum(0)
    wanted = size.topk(4).indices.sort().values
    assert all(torch.equal(d.lines, wanted) for d in adapter.deltas.values())


def test_activations_of_the_base_choose_units():
    """The rule A: the mean absolute value of what the second layer reads."""
    model, batches = feedforward(), [inputs(8, 12, seed=i) for i in range(3)]
    A = mean_activations(model, ["fc1", "fc2"], batches, lambda m, x: m(x))
    hidden = F.gelu(model.fc1(torch.cat(batches))).abs().mean(0)
    for name in ("fc1", "fc2"):
        torch.testing.assert_close(A[name], hidden.detach())
    form = S2FT(channels=0.1, select="activation", largest=False)
    adapter = fs.adapt(model, form, ["fc1", "fc2"], (), scores=A)
    wanted = hidden.topk(4, largest=False).indices.sort().values
    assert all(torch.equal(d.lines, wanted) for d in adapter.deltas.values())


def test_what_cannot_be_is_named():
    with pytest.raises(InputError, match=r"channels=0.*0, 1.*0.02"):
        S2FT(channels=0.0)
    with pytest.raises(InputError, match=r"select='weigth'.*'weight'"):
        S2FT(select="weigth")
    with pytest.raises(PlanError, match=r"select='activation' needs.*mean_activations"):
        S2FT(select="activation").plan([site(4, 4)])
    with pytest.raises(InputError, match=r"'site' needs scores.*0\.5"):
        S2FT(select="activation").plan([site(4, 6)], {"site": 0.5})
    with pytest.raises(InputError, match=r"'site' are \(4,\), expected \(4, 6\), \(6,\)"):
        S2FT(select="activation").plan([site(4, 6)], {"site": torch.ones(4)})


def test_scores_that_say_nothing_are_refused():
    form = S2FT(channels=0.1, select="gradient")
    with pytest.raises(InputError, match="scores for 'site' are not all finite"):
        form.plan([site(4, 6)], {"site": torch.full((4, 6), torch.nan)})
    with pytest.raises(InputError, match="lora with these options chooses nothing by scores"):
        fs.adapt(feedforward(), fs.LoRA(rank=2), ["fc1"], (), scores={"fc1": torch.ones(40)})


def test_counts():
    form = S2FT(channels=0.02)
    assert form.num_parameters(SiteShape("down", 4096, 11008)) == 220 * 4096
    assert S2FT(outputs=("up",)).num_parameters(SiteShape("mlp.up", 11008, 4096)) == 220 * 4096
    assert form.flops(SiteShape("down", 4096, 11008), 512) == 2 * 512 * 220 * 4096
