"""The mathematics of the steppers and maps, in float64 against dense references."""

import itertools

import pytest
import torch
from axis_runs import LORA, LSR, ready, rows
from tiers import sampled
from torch import nn

import finespun as fs
from finespun.contract import TensorSite
from finespun.contract.calculus import parameters_of, pull, push
from finespun.linalg import LowRank
from finespun.methods.dynamics import LoRAPro, Riemannian
from finespun.methods.dynamics.lora_pro import is_product
from finespun.methods.dynamics.muon import orthogonal
from finespun.methods.dynamics.pieces.adam_in_product import ProductAdamW
from finespun.methods.dynamics.pieces.normal import dot, solved, systems
from finespun.methods.dynamics.pieces.pairs import effect, effect_norm, nearest, norm, stacked
from finespun.methods.dynamics.riemannian import scaled

STRUCTURES = {
    "lora": LORA,
    "lsr": LSR,
    "tied_lora": fs.TiedLoRA(rank=3),
    "hira": fs.HiRA(rank=3),
    "lokr": fs.LoKr(),
    "dora": fs.DoRA(rank=3),
    "unilora": fs.UniLoRA(rank=3),
}


def delta_of(structure, out=20, width=24, seed=0, scale=None):
    """A delta in float64 with a gradient G of its update in every parameter's `.grad`."""
    g = torch.Generator().manual_seed(seed)
    site = TensorSite("layer", torch.randn(out, width, generator=g).double() / 5)
    plan = structure.plan([site])
    delta = structure.build(site, plan, structure.bank(plan)).double()
    if delta.bank is not None:
        delta.bank.double()
    if scale is not None:
        delta.scale = scale
    bank = [] if delta.bank is None else list(delta.bank.parameters())
    with torch.no_grad():
        for p in (*delta.parameters(), *bank):
            p.copy_(torch.randn(p.shape, generator=g).double() * 0.3)
    G = torch.randn(out, width, generator=g).double()
    named = pull(delta, G)
    own = {**dict(delta.named_parameters())}
    own |= {} if delta.bank is None else {f"bank.{n}": p for n, p in delta.bank.named_parameters()}
    for name, slope in named.items():
        own[name].grad = slope.clone()
    return delta, G, own


def dense(change):
    return change.dense() if isinstance(change, LowRank) else change


def jacobian(delta):
    """J (out·in, parameters), column by column."""
    theta, columns = parameters_of(delta), []
    for name, t in theta.items():
        for i in range(t.numel()):
            v = torch.zeros_like(t).flatten()
            v[i] = 1
            columns.append(dense(push(delta, {name: v.view_as(t)})).flatten())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_pair_is_the_smallest_least_squares_solution(scale):
    """LoRA-Pro's (hA, hB) = pinv(J) G, and ⟨g, h⟩ = ‖g̃‖²."""
    delta, G, _ = delta_of(LORA, scale=scale)
    (stack,) = stacked([delta])
    hL, hR = nearest(stack, damping=1e-14)
    wanted = torch.linalg.lstsq(jacobian(delta), G.flatten(), driver="gelsd").solution
    found = {"A": hR[0], "B": hL[0]}
    ours = torch.cat([found[n].flatten() for n in parameters_of(delta)])
    assert (ours - wanted).norm() < 1e-8 * wanted.norm()
    moved = effect(stack, (hL, hR))[0]
    inner = (stack.slope_left * hL).sum() + (stack.slope_right * hR).sum()
    assert inner == pytest.approx(float(moved.square().sum()), rel=1e-8)
    assert float(effect_norm(stack, (hL, hR))) == pytest.approx(float(moved.norm()), rel=1e-9)
    even = nearest(stack, damping=1e-14, small=False)
    assert (effect(stack, even)[0] - moved).norm() < 1e-9 * moved.norm()
    assert norm(even) > norm((hL, hR))


def test_the_effect_does_not_depend_on_the_gauge():
    delta, G, own = delta_of(LORA)
    first = effect(stacked([delta])[0], nearest(stacked([delta])[0], damping=1e-14))[0]
    T = torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        own["B"].copy_(own["B"] @ T)
        own["A"].copy_(torch.linalg.inv(T) @ own["A"])
    for name, slope in pull(delta, G).items():
        own[name].grad = slope
    stack = stacked([delta])[0]
    assert (effect(stack, nearest(stack, damping=1e-14))[0] - first).norm() < 1e-8 * first.norm()


def test_a_zero_side_moves_the_other_alone():
    """B = 0: hA = gA = 0, hB = gB (A Aᵀ)⁻¹ / s², so that g̃ = G P_A."""
    delta, G, own = delta_of(LORA, scale=2.0)
    with torch.no_grad():
        own["B"].zero_()
    for name, slope in pull(delta, G).items():
        own[name].grad = slope
    (stack,) = stacked([delta])
    hL, hR = nearest(stack, damping=1e-14)
    A = own["A"].detach()
    P = A.T @ torch.linalg.solve(A @ A.T, A)
    assert not hR.any()
    assert (effect(stack, (hL, hR))[0] - G @ P).norm() < 1e-10 * G.norm()


@pytest.mark.parametrize("name", sampled(STRUCTURES, 0.2))
def test_the_normal_operator_is_that_of_push_and_pull(name):
    delta, _, own = delta_of(STRUCTURES[name])
    (system,) = systems([delta])
    g = torch.Generator().manual_seed(7)
    v = [torch.randn(p.shape, generator=g).double() for p in system.theta]
    at = {id(p): n for n, p in own.items()}
    change = push(delta, {at[id(p)]: t for p, t in zip(system.theta, v)})
    wanted = pull(delta, change)
    for p, found in zip(system.theta, system.apply(v)):
        torch.testing.assert_close(found, wanted[at[id(p)]], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sampled(STRUCTURES, 0.2))
def test_more_iterations_follow_the_gradient_better(name):
    """cos(J h, G) rises with the iterations, to that of LoRA-Pro where the form is LoRA's."""
    delta, G, own = delta_of(STRUCTURES[name])
    (system,) = systems([delta])
    at, g = {id(p): n for n, p in own.items()}, [p.grad for p in system.theta]
    cosines = []
    for count in (1, 2, 5, 10, 60):
        h = solved(system.apply, g, count)
        moved = dense(push(delta, {at[id(p)]: t for p, t in zip(system.theta, h)}))
        cosines.append(float((moved * G).sum() / moved.norm() / G.norm()))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(cosines)), cosines
    if name == "lora":
        stack = stacked([delta])[0]
        best = effect(stack, nearest(stack, damping=1e-14))[0]
        assert cosines[-1] == pytest.approx(float((best * G).sum() / best.norm() / G.norm()))


def test_scaled_gradients_are_those_of_the_dense_projectors():
    """s (hB A + B hA) = s² (G P_A + P_B G) at δ → 0, and δ of the trace else."""
    delta, G, own = delta_of(LORA, scale=3.0)
    (stack,) = stacked([delta])
    A, B = own["A"].detach(), own["B"].detach()
    P_A = A.T @ torch.linalg.solve(A @ A.T, A)
    P_B = B @ torch.linalg.solve(B.T @ B, B.T)
    moved = effect(stack, scaled(stack, 1e-14, 0.0))[0]
    assert (moved - 9 * (G @ P_A + P_B @ G)).norm() < 1e-9 * G.norm()
    hL, _ = scaled(stack, 0.5, 1e-6)
    K = A @ A.T
    K = K + (0.5 * K.diagonal().mean() + 1e-6) * torch.eye(3).double()
    torch.testing.assert_close(hL[0], own["B"].grad @ torch.linalg.inv(K))


def test_a_gate_is_part_of_the_product():
    """Gated ranks: the pair for raw A moves ΔW as the pair for g ∘ A does."""
    delta, G, own = delta_of(LORA)
    gate = torch.tensor([1.0, 0.5, 2.0]).double()
    delta.set_gate(gate)
    for name, slope in pull(delta, G).items():
        own[name].grad = slope
    (stack,) = stacked([delta])
    best = effect(stack, pair := nearest(stack, damping=1e-14))[0]
    stack.write(pair)
    moved = dense(push(delta, {"A": own["A"].grad, "B": own["B"].grad}))
    assert (moved - best).norm() < 1e-9 * best.norm()
    left = G - best
    assert all(t.abs().max() < 1e-8 for t in pull(delta, left).values())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
def test_the_iteration_on_grams_is_that_on_the_matrix(shape):
    U = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).double()
    X = U / U.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        K = X @ X.mT
        X = 3.4445 * X + (-4.7750 * K + 2.0315 * K @ K) @ X
    found = orthogonal(U)
    assert (found - X).norm() < 1e-6 * X.norm()
    assert not orthogonal(torch.zeros(1, *shape)).any()


def test_full_lora_pro_of_a_square_factor_is_adamw_of_the_weight():
    """With an invertible B and A the product can follow any step: W moves as dense AdamW moves it,
    the gap shrinking with lr."""
    gaps = []
    for lr in (1e-3, 1e-4, 1e-5):
        delta, G, own = delta_of(fs.LoRA(rank=6, alpha=6), out=6, width=6)
        form = LoRAPro(mode="full", damping=1e-14)
        groups = [{"params": list(own.values()), "weight_decay": 0.0}]
        view = type("View", (), {"deltas": {"layer": delta}})()
        made = form.optimizer(view, groups, lr)
        W = nn.Parameter(delta.dense(delta.base_weight()).detach().clone())
        other, before = torch.optim.AdamW([W], lr=lr, weight_decay=0.0), W.detach().clone()
        W.grad = G.clone()
        stack = stacked([delta])[0]
        pair = nearest(stack, damping=1e-14)
        ratio = effect_norm(stack, pair) / norm(pair)
        stack.write((pair[0] * ratio, pair[1] * ratio))
        made.step()
        other.step()
        ours = delta.dense(delta.base_weight()).detach() - before
        gaps.append(float((ours - (W.detach() - before)).norm() / (W.detach() - before).norm()))
    assert gaps[1] < 0.2 * gaps[0]
    assert gaps[2] < 0.2 * gaps[1]


def test_lora_pro_by_sgd_is_fast_where_lora_is_slow():
    """½‖s B A − D‖², D of rank 4 with singular values 10, 3, 1, 0.3: from B = 0 in 15 steps."""
    g = torch.Generator().manual_seed(2)
    U = torch.linalg.qr(torch.randn(32, 4, generator=g).double())[0]
    V = torch.linalg.qr(torch.randn(24, 4, generator=g).double())[0]
    D = U @ torch.diag(torch.tensor([10.0, 3, 1, 0.3]).double()) @ V.T
    delta, _, own = delta_of(fs.LoRA(rank=4), out=32, width=24, scale=2.0)
    with torch.no_grad():
        own["B"].zero_()
    losses = []
    for _ in range(16):
        A, B = own["A"].detach(), own["B"].detach()
        R = 2 * B @ A - D
        losses.append(float(R.square().sum()))
        own["A"].grad, own["B"].grad = 2 * B.T @ R, 2 * R @ A.T
        (stack,) = stacked([delta])
        hL, hR = nearest(stack, damping=1e-12)
        with torch.no_grad():
            own["B"].sub_(0.5 * hL[0])
            own["A"].sub_(0.5 * hR[0])
    assert losses[-1] < 1e-6 * losses[0]


def raw_norms(adapter):
    return [
        torch.stack([p.grad.norm() for p in d.parameters()]).norm() for d in adapter.deltas.values()
    ]


@pytest.mark.parametrize("structure", [LORA, LSR], ids=["lora", "lsr"])
@pytest.mark.parametrize("value", [Riemannian(), LoRAPro()], ids=["riemannian", "light"])
def test_maps_keep_the_norm_of_raw_gradients(structure, value):
    model, adapter, _, driver = ready(value, structure, clip=0.0)
    model(**rows(1)).loss.backward()
    before = [
        torch.stack([p.grad.norm() for p in d.parameters()]).norm() for d in adapter.deltas.values()
    ]
    old = [p.grad.clone() for p in adapter.parameters()]
    driver._call("gradients_ready")
    after = [
        torch.stack([p.grad.norm() for p in d.parameters()]).norm() for d in adapter.deltas.values()
    ]
    for a, b in zip(before, after):
        assert float(a) == pytest.approx(float(b), rel=1e-4)
    assert any((a - p.grad).norm() > 1e-2 * a.norm() for a, p in zip(old, adapter.parameters()))
    assert dot(old, [p.grad for p in adapter.parameters()]) > 0


@pytest.mark.parametrize("factored", [False, True])
def test_products_that_view_one_parameter_move_as_if_each_had_its_own(factored):
    """MELoRA is two LoRAs side by side: moments are kept apart, also through a checkpoint."""
    joint, G, _ = delta_of(fs.MELoRA(rank=4, blocks=2))
    apart = [delta_of(fs.LoRA(rank=2), out=10, width=12, scale=joint.scale)[0] for _ in range(2)]
    for i, delta in enumerate(apart):
        with torch.no_grad():
            delta.A.copy_(joint.A[i])
            delta.B.copy_(joint.B[i])

    def stepper(deltas, saved=None):
        own = [p for d in deltas for p in d.trained_parameters()]
        made = ProductAdamW([{"params": own}], 0.05, deltas, 1e-4, factored)
        made.load_state_dict(saved) if saved else None
        return made

    one, other = stepper([joint]), stepper(apart)
    for step in range(4):
        if step == 2:
            one = stepper([joint], one.state_dict())
        for i, delta in enumerate(apart):
            part = G[10 * i : 10 * i + 10, 12 * i : 12 * i + 12] * (1 + step)
            for name, slope in pull(delta, part).items():
                getattr(delta, name).grad = slope
        joint.A.grad = torch.stack([d.A.grad for d in apart])
        joint.B.grad = torch.stack([d.B.grad for d in apart])
        one.step()
        other.step()
    for i, delta in enumerate(apart):
        torch.testing.assert_close(joint.A[i], delta.A, rtol=1e-3 if factored else 1e-9, atol=1e-6)
        torch.testing.assert_close(joint.B[i], delta.B, rtol=1e-3 if factored else 1e-9, atol=1e-6)


@pytest.mark.parametrize(
    ("structure", "one"),
    [(LORA, True), (fs.HiRA(rank=3), False), (fs.MELoRA(rank=4), False), (LSR, False)],
)
def test_what_is_one_product_is_told_from_what_is_made_of_products(structure, one):
    assert is_product(delta_of(structure)[0]) == one
