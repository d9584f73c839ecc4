"""Arithmetic on adapters without a model: identities on updates and on parameters."""

import dataclasses
import itertools

import pytest
import torch
from suite import batch, every, net, relative, stir, stirred

import finespun as fs
from finespun import hosts
from finespun.adapters.arithmetic import Parameters, Updates
from finespun.adapters.deltas import Deltas, update_of
from finespun.errors import InputError
from finespun.methods.structures import STRUCTURES, DoRA, LoHa

TARGETS = r"blocks\.\d\.up"
FORMS = {
    "lora": fs.LoRA(rank=3),
    "lsr": fs.LSR(rank=2, separation_rank=2),
    "loha": LoHa(rank=2),
}


def state_of(structure, seed, targets=TARGETS, train_modules=()):
    adapter = fs.adapt(net(), structure, targets, train_modules, name=f"s{seed}")
    stir(adapter.parameters(), seed=seed)
    adapter.scale = 0.5 + 0.25 * (seed % 3)
    return adapter.state()


def dense(state):
    """ΔW by site in float64, strength included."""
    return {
        name: update_of(delta, state.strength).dense().double()
        for name, delta in Deltas(state).items()
    }


def close(found, wanted, tolerance=1e-6):
    assert found.keys() == wanted.keys()
    assert all(relative(found[name], wanted[name]) < tolerance for name in wanted)


@pytest.mark.parametrize(("one", "two"), list(itertools.product(FORMS, repeat=2)))
def test_sums_and_differences_of_updates(one, two):
    a, b = state_of(FORMS[one], 1), state_of(FORMS[two], 2)
    x, y = dense(a), dense(b)
    total = (Updates(a) + Updates(b)).state("sum")
    close(dense(total), {name: x[name] + y[name] for name in x})
    close(dense((Updates(a) - 0.5 * Updates(b)).state("d")), {n: x[n] - 0.5 * y[n] for n in x})
    close(dense((Updates(a) + Updates(b) - Updates(b)).state("a")), x)
    close(dense((Updates(total) - Updates(b)).state("a")), x, 1e-5)
    assert total.structure.kind == "lora"
    assert (total.strength, total.base) == (1.0, a.base)


def test_a_sum_acts_in_a_model_as_its_terms_do():
    a, b = state_of(FORMS["lora"], 1), state_of(FORMS["lsr"], 2)
    model, total = net(), (Updates(a) + Updates(b)).state("sum")
    for state in (a, b, total):
        hosts.register(model, state)
    fs.activate(model, [a.name, b.name])
    wanted = model(batch())
    fs.activate(model, "sum")
    assert relative(model(batch()), wanted) < 1e-6


def test_sites_that_a_term_lacks_are_zero_there():
    a, b = state_of(FORMS["lora"], 1, ["blocks.0.up"]), state_of(FORMS["lora"], 2)
    x, y = dense(a), dense(b)
    found = dense((Updates(b) - Updates(a)).state("d"))
    close(found, {name: y[name] - x.get(name, 0 * y[name]) for name in y})
    gone = dense((Updates(a) - Updates(a)).state("zero"))
    assert gone.keys() == x.keys()
    assert not any(value.any() for value in gone.values())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_of_a_squeeze_is_the_one_predicted(rank):
    whole = Updates(state_of(FORMS["lora"], 1)) + Updates(state_of(FORMS["lsr"], 2))
    small, exact = whole.squeeze(rank), dense(whole.state("w"))
    found, predicted = dense(small.state("s")), whole.errors(rank)
    for name, value in exact.items():
        tail = torch.linalg.svdvals(value)[rank:].norm() / value.norm()
        assert predicted[name] == pytest.approx(float(tail), abs=1e-6)
        assert relative(found[name], value) == pytest.approx(predicted[name], abs=1e-6)
        assert small[name].rank == rank


def test_a_projection_lies_in_the_other_and_leaves_what_is_orthogonal_to_it():
    a, b = state_of(FORMS["lora"], 1), state_of(FORMS["loha"], 2)
    part = Updates(a).project(Updates(b).squeeze(2))
    rest = Updates(a) - part
    for name in part:
        inside = Updates(b).squeeze(2)[name].svd()
        P, Q = inside.U @ inside.U.mT, inside.Vh.mT @ inside.Vh
        value = part[name].dense()
        assert relative(value, P @ Updates(a)[name].dense() @ Q) < 1e-9
        assert relative(P @ value @ Q, value) < 1e-9
        assert abs(float((value * rest[name].dense()).sum())) < 1e-9 * float(value.norm()) ** 2
    again = part.project(Updates(b).squeeze(2))
    assert all(relative(again[n].dense(), part[n].dense()) < 1e-9 for n in part)


def test_ranks_never_exceed_what_a_shape_can_have():
    many = [Updates(state_of(fs.LoRA(rank=16), seed)) for seed in range(1, 4)]
    total = many[0] + many[1] + many[2]
    state = total.state("sum")
    assert {state.plan.choices[n]["rank"] for n in total} == {24}
    wanted = {n: sum(m[n].dense() for m in many) for n in total}
    close(dense(state), wanted)


def test_copies_of_modules_are_taken_over_or_left_out_by_name():
    a = state_of(FORMS["lora"], 1, train_modules=("head",))
    b = state_of(FORMS["lora"], 2)
    with pytest.raises(InputError, match=r"copies of modules \(head\).*modules='none'"):
        (Updates(a) + Updates(b)).state("sum")
    assert (Updates(a) + Updates(b)).state("sum", modules="none").trained == ()
    kept = (Updates(a) + Updates(b)).state("sum", modules=a)
    assert kept.trained == ("head",)
    assert all(torch.equal(kept.module("head")[k], t) for k, t in a.module("head").items())


def test_updates_that_read_the_base_need_its_sites():
    model = net()
    adapter = fs.adapt(model, DoRA(rank=2), TARGETS, ())
    stir(adapter.parameters())
    state = adapter.state()
    with pytest.raises(InputError, match=r"depends on the base weight: give the sites"):
        Updates(state).state("x")
    places = hosts.sites(model, adapter.deltas, state.structure)
    found = dense(Updates(state, lambda shape: places[shape.name]).state("x"))
    close(found, {n: u.dense().double() for n, u in adapter.updates().items()})


def test_updates_of_other_shapes_and_weights_that_are_none_are_refused():
    a = state_of(FORMS["lora"], 1)
    wrong = dataclasses.replace(a.plan.sites[0], out_features=7)
    sites = (wrong, *a.plan.sites[1:])
    b = a.with_tensors(a.tensors, dataclasses.replace(a.plan, sites=sites))
    with pytest.raises(InputError, match="differs in shape"):
        (Updates(a) + Updates(b)).state("x")
    with pytest.raises(InputError, match="must be a finite number"):
        Updates(a) * float("nan")


# --- parameters --------------------------------------------------------------------------------
def pair(case):
    """Two states of one form, with a head."""
    STRUCTURES[case.structure.kind] = type(case.structure)
    _, adapter = stirred(case, net(), ("head",))
    first = adapter.state()
    stir(adapter.parameters(), seed=19)
    return first.named("a"), adapter.state().named("b")


@every()
def test_parameters_come_back_exactly(case):
    a, b = pair(case)
    again = (Parameters(a) + Parameters(b) - Parameters(b)).state("a")
    assert again.form is a.form
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in a.tensors.items())
    own = Parameters.average([a, a, a]).state("a")
    assert all(torch.equal(own.tensors[key], tensor) for key, tensor in a.tensors.items())


@every()
def test_an_average_lies_between_and_is_rounded_once(case):
    a, b = pair(case)
    mean = Parameters.average([a, b], [1, 3]).state("mean")
    assert mean.form is a.form
    for key, tensor in mean.tensors.items():
        x, y = a.tensors[key], b.tensors[key]
        if key.role == "parameter" and x.is_floating_point():
            assert torch.equal(tensor, (0.25 * x.double() + 0.75 * y.double()).to(x.dtype))
        else:
            assert torch.equal(tensor, x)


REFUSED = {
    "rank": (
        lambda: (state_of(fs.LoRA(rank=2), 1), state_of(fs.LoRA(rank=3), 1)),
        "differ in form",
    ),
    "structure": (
        lambda: (state_of(fs.LoRA(rank=2), 1), state_of(fs.LoRA(rank=2, seed=1), 1)),
        "differ in form",
    ),
    "sites": (
        lambda: (state_of(fs.LoRA(rank=2), 1), state_of(fs.LoRA(rank=2), 1, ["blocks.0.up"])),
        "differ in form",
    ),
    "strength": (
        lambda: (state_of(fs.LoRA(rank=2), 1), state_of(fs.LoRA(rank=2), 2)),
        "have the strengths",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_of_unequal_forms_are_refused(name):
    make, told = REFUSED[name]
    with pytest.raises(InputError, match=told):
        Parameters.average(make()).state("x")


def test_masks_that_differ_are_not_added_up():
    states = []
    for rank in range(2):
        adapter = fs.adapt(net(), fs.LoRA(rank=2), TARGETS, ())
        stir(adapter.parameters())
        for delta in adapter.deltas.values():
            delta.switch_off(delta.groups("rank")[rank])
        states.append(adapter.state())
    with pytest.raises(InputError, match=r"alive_A' of .* differs, and cannot be added up"):
        Parameters.average(states).state("x")
    same = Parameters.average([states[0], states[0]]).state("x")
    assert same.tensors.keys() == states[0].tensors.keys()


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("inf")]])
def test_weights_that_are_none_are_refused(weights):
    state = state_of(fs.LoRA(rank=2), 1)
    with pytest.raises(InputError, match="weight"):
        Parameters.average([state, state.named("other")], weights).state("x")
