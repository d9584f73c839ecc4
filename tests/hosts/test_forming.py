"""All layers' factors in one product: formed once a forward pass, never stale, never lost."""

import copy
import itertools

import pytest
import torch
from suite import CASES, adapted, batch, draw, every, net, relative, stir, stirred
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

import finespun as fs
from finespun.methods.structures import LSR

LSR_CASE = next(case for case in CASES if case.name == "lsr")
TOGETHER = every(lambda case: case.structure.forms_together)


@pytest.fixture
def calls(monkeypatch):
    """How many deltas each call of LSR.form was given."""
    seen, form = [], LSR.form

    def counted(self, deltas):
        seen.append(len(deltas))
        return form(self, deltas)

    monkeypatch.setattr(LSR, "form", counted)
    return seen


def alone(adapter, run):
    """What `run` gives when every layer forms its own factors."""
    factor_cache, adapter.attached.factor_cache = adapter.attached.factor_cache, None
    try:
        return run()
    finally:
        adapter.attached.factor_cache = factor_cache


def gradients(adapter, loss):
    return torch.autograd.grad(loss, adapter.parameters())


@TOGETHER
def test_form_gives_each_deltas_own_factors(case):
    _, adapter = stirred(case, net())
    deltas = list(adapter.deltas.values())
    for (A, B), delta in zip(case.structure.form(deltas), deltas):
        wanted = delta.low_rank()
        assert A.shape == wanted[0].shape
        assert relative(A, wanted[0]) <= 1e-6
        assert relative(B, wanted[1]) <= 1e-6


def test_formed_once_a_step_and_once_for_all_in_evaluation(calls):
    model, adapter = stirred(LSR_CASE, net().train())
    for step in range(1, 4):
        model(batch()).sum().backward()
        assert calls == [4] * step
    calls.clear()
    with torch.no_grad():
        model(batch())
        model(batch(2))
        assert calls == [4]
        stir(adapter.parameters()[:1])
        model(batch())
        assert calls == [4, 4]


@TOGETHER
def test_evaluation_sees_every_change_of_the_numbers(case):
    model, adapter = stirred(case, net())
    x = batch()

    def fresh():
        with torch.no_grad():
            y, wanted = model(x), alone(adapter, lambda: model(x))
        assert relative(y, wanted) <= 1e-6
        return y

    seen = [fresh()]
    stir(adapter.parameters(), seed=50)
    seen.append(fresh())
    model.load_state_dict({k: 1.05 * v for k, v in model.state_dict().items()})
    seen.append(fresh())
    vector_to_parameters(1.1 * parameters_to_vector(adapter.parameters()), adapter.parameters())
    seen.append(fresh())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    seen.append(fresh())
    with torch.inference_mode():
        assert relative(model(x).clone(), seen[-1]) <= 1e-6
    for before, after in itertools.pairwise(seen):
        assert relative(after, before) > 1e-4


@TOGETHER
def test_several_forwards_before_one_backward(case):
    model, adapter = stirred(case, net().train().double())
    model.double()
    x, z = batch(dtype=torch.float64), batch(seed=8, dtype=torch.float64)

    def run():
        return gradients(adapter, (model(x) * model(z)).sum() + model(x).square().sum())

    for a, b in zip(run(), alone(adapter, run)):
        assert relative(a, b) <= 1e-10


@TOGETHER
def test_a_part_of_the_model_may_be_called_on_its_own(case):
    """The root is not entered: by every block in turn, in another order, and one block twice."""
    model, adapter = stirred(case, net().train().double())
    model.double()
    x = draw(3, 24, dtype=torch.float64)
    first, second = model.blocks
    for run in (
        lambda: second(first(x)),
        lambda: first(second(x)),
        lambda: first(first(x)) + second(x),
    ):
        loss = run().square().sum()
        wanted = alone(adapter, lambda run=run: gradients(adapter, run().square().sum()))
        for a, b in zip(gradients(adapter, loss), wanted):
            assert relative(a, b) <= 1e-10


@TOGETHER
def test_parts_trained_in_turn_do_not_share_a_graph(case):
    model, adapter = stirred(case, net().train().double())
    model.double()
    x = draw(3, 24, dtype=torch.float64)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for part in (model.blocks[0], model.blocks[1], model.blocks[0]):
        optimizer.zero_grad()
        y = part(x)
        assert relative(y, alone(adapter, lambda part=part: part(x))) <= 1e-10
        y.square().sum().backward()
        optimizer.step()


@TOGETHER
@pytest.mark.parametrize("whole", [True, False])
def test_checkpointing_gives_the_same_gradients(case, whole):
    model, adapter = stirred(case, net().train().double())
    model.double()
    x = batch(dtype=torch.float64)

    def saved():
        if whole:
            return checkpoint(model, x, use_reentrant=False)
        h = x
        for block in model.blocks:
            h = checkpoint(block, h, use_reentrant=False)
        return model.head(h.mean(1))

    wanted = gradients(adapter, model(x).square().sum())
    for a, b in zip(gradients(adapter, saved().square().sum()), wanted):
        assert relative(a, b) <= 1e-10


@TOGETHER
def test_function_transforms_see_the_numbers_they_are_given(case):
    model, _ = stirred(case, net())
    x, goal = batch(), draw(6, 5, seed=9)
    numbers = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(given):
        return (torch.func.functional_call(model, given, (x,)) * goal).sum()

    wanted = torch.autograd.grad(loss(numbers), numbers.values())
    found = torch.func.grad(loss)({n: p.detach() for n, p in numbers.items()})
    for name, gradient in zip(numbers, wanted):
        assert relative(found[name], gradient) <= 1e-5
    with torch.no_grad():
        two = {n: torch.stack([p, 1.1 * p]) for n, p in numbers.items()}
        both = torch.func.vmap(lambda t: torch.func.functional_call(model, t, (x,)))(two)
        assert relative(both[0], model(x)) <= 1e-5
        assert relative(both[1], model(x)) > 1e-4


def test_an_error_in_a_forward_pass_leaves_nothing_behind():
    model, adapter = stirred(LSR_CASE, net().train())
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, 5))
    assert not adapter.attached.factor_cache.inside
    x = batch()
    assert relative(model(x), alone(adapter, lambda: model(x))) <= 1e-6


def test_numbers_formed_without_gradients_do_not_stop_training():
    model, adapter = stirred(LSR_CASE, net().train())
    x = batch()
    with torch.no_grad():
        model(x)
    assert all(g.abs().sum() > 0 for g in gradients(adapter, model(x).square().sum()))


def test_a_copy_forms_its_own_numbers():
    model, _ = stirred(LSR_CASE, net())
    x = batch()
    with torch.no_grad():
        y = model(x)
        other = copy.deepcopy(model)
        stir(fs.Adapter(other, "default").parameters(), seed=50)
        assert relative(other(x), y) > 1e-4
        assert torch.equal(model(x), y)


def test_gates_and_exact_starts_act_on_what_is_formed():
    model, adapter = adapted(LSR_CASE, net())
    for i, delta in enumerate(adapter.deltas.values()):
        delta.set_gate(torch.linspace(0, 1, 4))
        if i % 2:
            delta.keep_start()
    stir(adapter.parameters())
    x = batch()
    assert relative(model(x), alone(adapter, lambda: model(x))) <= 1e-6


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_a_fused_optimiser_counts_as_a_change(fused):
    """Fused kernels write without raising the version of what they write."""
    model, adapter = stirred(LSR_CASE, net())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=fused)
    model(batch()).square().sum().backward()
    with torch.no_grad():
        before = model(batch())
        optimizer.step()
        after = model(batch())
        assert relative(after, alone(adapter, lambda: model(batch()))) <= 1e-6
    assert relative(after, before) > 1e-3
