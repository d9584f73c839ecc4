"""Exact start, gate and death: ΔW = scale · Σ_i g_i (B_i A_i − B0_i A0_i), for every structure."""

import itertools
from functools import partial

import pytest
import torch
from suite import INNER, WIDTH, batch, draw, every_structure, net, relative, stir, stirred
from torch import nn

import finespun as fs
from finespun.contract import TensorSite, module_group
from finespun.methods.structures import STRUCTURES

KINDS = ("rank", "term")


def free(case):
    """The case's delta without an exact start, away from its beginning."""
    site_shape = (WIDTH if case.block else INNER, WIDTH)
    site = TensorSite(
        "site", draw(*site_shape, seed=5) / 5, draw(site_shape[0], seed=6), case.structure.site_kind
    )
    plan = case.structure.plan([site])
    delta = case.structure.build(site, plan, case.structure.bank(plan))
    stir(trained(delta))
    return delta


def trained(delta):
    return [*delta.trained_parameters(), *(delta.bank.parameters() if delta.bank else ())]


def factored(case):
    return case.delta().low_rank() is not None


def has_groups(case):
    delta = case.delta()
    return any(delta.groups(kind) for kind in KINDS)


@every_structure(factored)
@pytest.mark.parametrize("gate_first", [True, False])
def test_the_gate_multiplies_what_the_start_was_taken_away_from(case, gate_first):
    delta, x = free(case), draw(5, WIDTH)
    A0, B0 = (t.detach().clone() for t in delta.low_rank())
    gate = torch.linspace(-1, 2, len(A0))
    steps = [lambda: delta.set_gate(gate), delta.keep_start]
    for step in steps if gate_first else steps[::-1]:
        step()
    assert torch.count_nonzero(delta(x)) == 0
    stir([p for p in trained(delta) if p.requires_grad], seed=8)
    A, B = (t.detach().double() for t in delta.low_rank())
    terms = [g * (B[:, [i]] @ A[[i]] - B0[:, [i]] @ A0[[i]]) for i, g in enumerate(gate)]
    wanted = delta.scale * sum(terms)
    assert relative(delta(x), x.double() @ wanted.T) <= 10 * case.tolerance
    assert relative(delta.as_low_rank().dense(), wanted) <= 10 * case.tolerance
    assert not any(k.startswith(("start.gate", "start.alive")) for k in delta.state_dict())


@every_structure(has_groups)
@pytest.mark.parametrize("start", [True, False])
def test_what_is_switched_off_has_no_output(case, start):
    delta, x = free(case), draw(5, WIDTH)
    if start:
        delta.keep_start()
        stir(list(delta.trained_parameters()), seed=8)
    for kind in KINDS:
        groups = delta.groups(kind)
        for group in groups:
            assert group in delta.live(kind)
            delta.switch_off(group)
            assert group not in delta.live(kind)
            assert group.norm(delta) == 0
        if groups:
            assert torch.count_nonzero(delta(x)) == 0
            assert delta.silent
            assert not delta.dead


@every_structure(lambda case: case.delta().groups("rank"))
@pytest.mark.parametrize("start", [True, False])
def test_a_rank_that_is_switched_off_takes_its_own_term_along(case, start):
    delta = free(case)
    pairs = [[t.detach().clone() for t in delta.low_rank()]]
    if start:
        delta.keep_start()
        stir(list(delta.trained_parameters()), seed=8)
        pairs.append([t.detach().clone() for t in delta.low_rank()])
    signs = (-1, 1) if start else (1,)
    delta.switch_off(delta.groups("rank")[1])
    rest = [i for i in range(len(pairs[0][0])) if i != 1]
    left = sum(s * B[:, rest] @ A[rest] for s, (A, B) in zip(signs, pairs)) * delta.scale
    assert relative(delta.as_low_rank().dense(), left) <= 10 * case.tolerance


@every_structure(lambda case: list(case.delta().trained_parameters()))
def test_a_model_whose_updates_are_dead_is_its_base(case):
    plain, x = net(), batch()
    model, adapter = stirred(case)
    assert not torch.equal(model(x), plain(x))
    for delta in adapter.deltas.values():
        delta.switch_off(module_group(delta))
    assert torch.equal(model(x), plain(x))
    with fs.rows(model, ["default"] * len(x)):
        assert torch.equal(model(x), plain(x))
    stir(list(adapter.parameters()))
    assert torch.equal(model(x), plain(x))


@every_structure(lambda case: STRUCTURES.get(case.structure.kind) is type(case.structure))
def test_death_is_saved_and_taken_back_by_loading(case, tmp_path):
    model, adapter = stirred(case)
    awake = model(batch())
    adapter.save(tmp_path / "awake")
    first = next(iter(adapter.deltas.values()))
    kept = {k: v.clone() for k, v in first.state_dict().items()}
    first.switch_off(module_group(first))
    partly = model(batch())
    adapter.save(tmp_path / "partly")
    for folder, wanted in (("awake", awake), ("partly", partly)):
        other = net()
        loaded = fs.load(other, tmp_path / folder)
        assert [d.dead for d in loaded.deltas.values()].count(True) == (folder == "partly")
        torch.testing.assert_close(other(batch()), wanted)
    first.load_state_dict(kept)
    assert torch.equal(model(batch()), awake)


@every_structure(lambda case: list(case.delta().trained_parameters()))
def test_dead_updates_are_left_out_by_compaction(case):
    model, adapter = stirred(case)
    first, *others = adapter.deltas.values()
    first.switch_off(module_group(first))
    wanted, kind = model(batch()), adapter.structure.kind
    adapter.compact()
    assert adapter.structure.kind == kind
    assert len(adapter.deltas) == len(others)
    torch.testing.assert_close(model(batch()), wanted, rtol=1e-5, atol=1e-6)


@every_structure(factored)
def test_a_gate_that_is_trained_keeps_its_identity(case):
    delta, x = free(case), draw(3, WIDTH)
    rank = len(delta.low_rank()[0])
    delta.set_gate(torch.ones(rank), trained=True)
    gate = delta.get_parameter("gate")
    delta(x).square().sum().backward()
    assert gate.grad is not None
    assert gate.grad.norm() > 0
    state = {k: v.clone() for k, v in delta.state_dict().items()}
    state["gate"] = torch.linspace(0, 1, rank)
    delta.load_state_dict(state)
    assert delta.get_parameter("gate") is gate
    assert gate.requires_grad
    assert torch.equal(gate, state["gate"])
    delta.set_gate(torch.ones(rank))
    assert "gate" not in dict(delta.named_parameters())
    held = delta.get_buffer("gate")
    delta.load_state_dict(state)
    assert delta.get_buffer("gate") is held


def sizes(case):
    """Weights of odd shapes that the structure's plan accepts; those it refuses say so early."""
    prime = [(13, 11), (11, 13), (INNER, WIDTH)]
    return [(n, n) for _, n in prime] if case.block else prime


@every_structure()
def test_every_shape_and_weight_starts_and_moves_without_nan(case):
    accepted = 0
    for (out, inner), zero, rows in itertools.product(sizes(case), (True, False), (0, 1, 5)):
        value = torch.zeros(out, inner) if zero else draw(out, inner, seed=5) / 5
        site = TensorSite("site", value, draw(out, seed=6), case.structure.site_kind)
        try:
            plan = case.structure.plan([site])
        except fs.errors.PlanError:
            continue
        accepted += 1
        delta = case.structure.build(site, plan, case.structure.bank(plan))
        if case.exact_start and not case.structure.starts_at_zero:
            delta.keep_start()
        x = draw(rows, inner, seed=2).requires_grad_()
        layer = nn.functional.linear
        for moved in (False, True):
            if moved:
                stir([p for p in trained(delta) if p.requires_grad])
            y = delta(x)
            assert y.shape == (rows, out)
            ways = [y]
            if not case.block:
                W = delta.dense(delta.base_weight())
                assert torch.isfinite(W).all()
                ways.append(layer(x.to(W.dtype), W))
                if "through" in delta.written and delta.origin is None:
                    base = partial(layer, weight=value, bias=site.bias())
                    shift = delta.bias_change()
                    added = delta.through(x, base) - base(x)
                    ways.append(added if shift is None else added - shift)
            for way in ways:
                assert torch.isfinite(way).all()
                torch.testing.assert_close(way, y, rtol=1e-4, atol=1e-5)
            moving = [x, *(p for p in trained(delta) if p.requires_grad)]
            total = sum(way.sum() for way in ways)
            pull = torch.autograd.grad(total, moving, allow_unused=True)
            assert all(torch.isfinite(g).all() for g in pull if g is not None)
    assert accepted
