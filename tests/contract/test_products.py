"""Products, row forms and row norms of every structure, against what they must multiply out to."""

import pytest
import torch
import torch.nn.functional as F
from suite import CASES, INNER, WIDTH, draw, every, relative, stir

import finespun as fs
from finespun.contract import RowForm, TensorSite, module_group
from finespun.errors import InputError
from finespun.kernels.kron import kron_restore
from finespun.methods import structures
from finespun.methods.structures.lor2c import End
from finespun.methods.structures.pieces.extras import BiasDelta

WIDE = torch.float64
WHOLE = ("lora", "lora-rslora", "bypass", "block_lora", "lor2c")  # ΔW is their one product
SIDES = ("lsr", "lsr-formed", "lsr-factorised", "lsr-official", "lsr-shadow")
PRODUCTS = {  # name of a case -> how many; all others have none
    **dict.fromkeys(WHOLE, 1),
    **dict.fromkeys(SIDES, 2),
    **dict.fromkeys(("dora-through", "hira-own", "block_lora-input"), 1),
    **dict.fromkeys(("loha", "loha-dense", "melora"), 2),
    **dict.fromkeys(("krona", "lokr", "lokr-both", "lokr-full"), 1),
    **{"gralora": 4, "gralora-hybrid": 17},
}
GAINED = {"dora-through", "ia3-own", "ia3-input"}


def ready(case, start=False):
    """The case's delta in float64, moved; away from a kept start, itself moved, if asked."""
    delta = case.delta(WIDE).double()
    if delta.bank is not None:
        delta.bank.double()
    if start and delta.origin is None:
        moved(delta, seed=11).keep_start()
    return moved(delta)


def moved(delta, seed=3):
    own = [*delta.trained_parameters(), *(delta.bank.parameters() if delta.bank else ())]
    stir([p for p in own if p.requires_grad], seed)
    return delta


def gated(delta):
    """The delta behind a gate of which one number is zero."""
    delta.set_gate(torch.linspace(-1, 2, len(delta.low_rank()[0]), dtype=WIDE).round(decimals=3))
    return delta


def update(delta):
    """ΔW as a tensor, also for a bypass."""
    pair = delta.factors()
    return delta.dense(delta.base_weight()) if pair is None else delta.scale * (pair[1] @ pair[0])


def base(delta, x):
    """W0 x + b0; around a block, any function of x."""
    return torch.tanh(x) if delta.site.shape.kind == "block" else F.linear(x, *theirs(delta))


def theirs(delta):
    return delta.site.weight().detach(), delta.site.bias().detach()


def wanted(delta, x, strength=1.0):
    """The adapted layer's output by its definition."""
    y = base(delta, x) + strength * F.linear(x, update(delta))
    change = delta.bias_change()
    return y if change is None else y + strength * change


def factored(case):
    return case.delta().low_rank() is not None


def bilinear(case):
    return case.name in WHOLE


def separable(case):
    return case.name in SIDES


def producing(case):
    return case.name in PRODUCTS


def same(got, expected):
    got, expected = got.detach(), expected.detach()
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max() + 1))


# --- products --------------------------------------------------------------------------------
@every()
def test_what_is_bilinear_has_products_and_nothing_else(case):
    delta = ready(case)
    found = delta.products()
    assert len(found) == PRODUCTS.get(case.name, 0)
    assert bool(delta.products_reason) == (not found)
    if not found:
        assert "'site'" in delta.products_reason
        assert type(delta).__name__ in delta.products_reason


@every(producing)
@pytest.mark.parametrize("start", [False, True])
def test_an_update_knows_the_sides_of_a_product_by_their_product_alone(case, start):
    """(L M)(M⁻¹ R) is L R: to every part of the update that has its products, sides are free."""
    delta = ready(case, start)
    for at, product in enumerate(delta.products()):
        k, L, R = product.L.shape[1], product.L.clone(), product.R.clone()
        M = torch.eye(k, dtype=WIDE) + 0.3 * draw(k, k, seed=20 + at, dtype=WIDE)
        before = update(delta).detach()
        with torch.no_grad():
            product.left().copy_(L @ M)
            product.right().copy_(torch.linalg.solve(M, R))
        assert relative(product.left(), L) > 1e-3
        same(update(delta).detach(), before)


@every(producing)
@pytest.mark.parametrize("start", [False, True])
def test_an_update_is_affine_in_each_of_its_products(case, start):
    """Its gradients at the sides are s·G Rᵀ and s·Lᵀ G of one G: the slope at the product."""
    delta = ready(case, start)
    M = draw(*update(delta).shape, seed=4, dtype=WIDE)
    for product in delta.products():
        before = (update(delta) * M).sum()
        left, right = slopes(delta, before, product)
        assert left.norm() > 0
        same(product.L.mT @ left, right @ product.R.mT)
        if case.constant:
            continue
        step = draw(*product.L.shape, seed=8, dtype=WIDE)
        with torch.no_grad():
            product.left().add_(step)
        same((update(delta) * M).sum(), before + (left * step).sum())


def slopes(delta, loss, product):
    """The gradients at the two sides, read through their views."""
    own = list(delta.trained_parameters())
    found, kept = torch.autograd.grad(loss, own), [p.detach().clone() for p in own]
    with torch.no_grad():
        for parameter, gradient in zip(own, found):
            parameter.copy_(gradient)
        sides = product.left().clone(), product.right().clone()
        for parameter, value in zip(own, kept):
            parameter.copy_(value)
    return sides


CELLS = {  # name of a case -> place in the update of the products, in order
    "melora": [(slice(20 * i, 20 * i + 20), slice(12 * i, 12 * i + 12)) for i in range(2)],
    "gralora": [
        (slice(20 * j, 20 * j + 20), slice(12 * n, 12 * n + 12)) for n in range(2) for j in range(2)
    ],
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("gate", [False, True])
def test_cells_are_the_products_at_their_places(name, gate):
    (case,) = (c for c in CASES if c.name == name)
    delta = gated(ready(case)) if gate else ready(case)
    built = torch.zeros_like(update(delta))
    for at, product in zip(CELLS[name], delta.products(), strict=True):
        built[at] += product.scale * product.L @ product.R
    same(built, update(delta).detach())


@every(lambda case: case.name.startswith(("loha", "lokr")) and factored(case))
def test_a_gate_inside_of_a_product_leaves_none(case):
    delta = gated(ready(case))
    assert delta.products() == []
    assert "gate" in delta.products_reason


@every(bilinear)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_a_product_is_the_update_with_the_start_taken_away(case, gate, start):
    delta = ready(case, start)
    delta = gated(delta) if gate else delta
    (product,) = delta.products()
    constant = torch.zeros_like(update(delta))
    if start:
        A0, B0 = delta.origin.low_rank()
        constant = B0 @ (A0 if product.gate is None else product.gate[:, None] * A0)
    same(product.scale * (product.L @ product.R - constant), update(delta).detach())
    assert (product.gate is not None) == gate


@every(bilinear)
@pytest.mark.parametrize("gate", [False, True])
def test_what_is_written_through_a_side_moves_the_update(case, gate):
    delta = gated(ready(case)) if gate else ready(case)
    (product,), before = delta.products(), update(delta).detach()
    dL, dR = draw(*product.L.shape, seed=8, dtype=WIDE), draw(*product.R.shape, seed=9, dtype=WIDE)
    L, R = product.L.clone(), product.R.clone()
    with torch.no_grad():
        product.left().add_(dL)
    same(update(delta) - before, product.scale * dL @ R)
    with torch.no_grad():
        product.right().add_(dR)
    dR = dR if product.gate is None else product.gate[:, None] * dR
    same(update(delta) - before, product.scale * ((L + dL) @ (R + dR) - L @ R))


@every(bilinear)
def test_gradients_at_the_views_are_those_of_the_product(case):
    delta = gated(ready(case))
    (product,), M = delta.products(), draw(*update(delta).shape, seed=4, dtype=WIDE)
    left, right = torch.autograd.grad((update(delta) * M).sum(), (product.left(), product.right()))
    same(left, product.scale * M @ product.R.mT)
    same(right, product.gate[:, None] * product.scale * product.L.mT @ M)


def restored(delta):
    """The trimmed A and B that the products of an LSR multiply out to."""
    choice, shape = delta.choice, delta.site.shape
    down, up = (p.scale * p.L @ p.R for p in delta.products())
    A = kron_restore(down, *choice["ranks"], *choice["down"])
    B = kron_restore(up, *choice["up"], *choice["ranks"])
    return A[:, : shape.in_features], B[: shape.out_features]


@every(separable)
def test_products_of_lsr_are_the_rearranged_sides(case):
    delta = ready(case)
    A, B = delta.low_rank()
    for got, expected in zip(restored(delta), (A.detach(), B.detach())):
        same(got, expected)


@every(separable)
def test_what_is_written_through_lsr_moves_its_sides(case):
    delta = ready(case)
    for at, product in enumerate(delta.products()):
        others = delta.low_rank()[1 - at].detach()
        dL, dR = draw(*product.L.shape, seed=8, dtype=WIDE), draw(*product.R.shape, dtype=WIDE)
        wanted = (product.L + dL) @ (product.R + dR)
        with torch.no_grad():
            product.left().add_(dL)
            product.right().add_(dR)
        now = delta.products()[at]
        same(now.L @ now.R, wanted)
        same(restored(delta)[at], delta.low_rank()[at].detach())
        assert torch.equal(delta.low_rank()[1 - at], others)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 13, 3), (31, 29, 6), (48, 20, 4)])
def test_products_of_lsr_at_any_size_include_the_padding(sizes):
    out, inner, rank = sizes
    site = TensorSite("s", draw(out, inner, dtype=WIDE))
    form = fs.LSR(rank=rank if rank <= min(out, inner) else 1, separation_rank=2)
    delta = moved(form.build(site, form.plan([site])).double())
    for got, expected in zip(restored(delta), delta.low_rank()):
        same(got, expected.detach())


@every()
def test_a_dead_update_has_no_products_and_an_empty_form(case):
    delta = ready(case)
    delta.switch_off(module_group(delta))
    assert delta.products() == []
    assert delta.row_form() == RowForm()
    assert delta.row_form_reason == delta.products_reason == ""
    assert torch.count_nonzero(delta.row_norms()) == 0


# --- row forms -------------------------------------------------------------------------------
@every()
@pytest.mark.parametrize("start", [False, True])
def test_every_structure_has_a_row_form_or_says_why_not(case, start):
    delta = ready(case, start)
    form = delta.row_form()
    assert (form is None) == bool(delta.row_form_reason)
    assert (form is not None) == (factored(case) or case.name in GAINED)
    if form is None:
        assert "'site'" in delta.row_form_reason
        assert type(delta).__name__ in delta.row_form_reason


def has_form(case):
    return case.delta().row_form() is not None


@every(has_form)
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.3, -1.5])
def test_a_row_form_computes_the_adapted_layer(case, start, strength):
    delta, x = ready(case, start), draw(2, 3, WIDTH, dtype=WIDE)
    form = delta.row_form().at(strength)
    got, plain = form.through(x, lambda h: base(delta, h)), base(delta, x)
    assert relative(got - plain, wanted(delta, x, strength) - plain) <= 1e-6


@every(factored)
@pytest.mark.parametrize("start", [False, True])
def test_a_row_form_computes_the_gated_layer(case, start):
    delta, x = gated(ready(case, start)), draw(4, WIDTH, dtype=WIDE)
    got, plain = delta.row_form().through(x, lambda h: base(delta, h)), base(delta, x)
    assert relative(got - plain, wanted(delta, x) - plain) <= 1e-6


@every(has_form)
def test_a_row_form_answers_in_the_dtype_of_the_base(case):
    delta, x = ready(case).float(), draw(4, WIDTH, dtype=torch.bfloat16)
    got = delta.row_form().through(x, lambda h: base(delta, h.double()).bfloat16())
    assert got.dtype == torch.bfloat16
    assert relative(got, wanted(delta.double(), x.double())) <= 2e-2


@pytest.mark.parametrize("form", [fs.LoRA(rank=2), structures.DoRA(rank=2)])
@pytest.mark.parametrize("start", [False, True])
def test_a_trained_bias_is_in_the_row_form(form, start):
    site = TensorSite("s", draw(INNER, WIDTH, dtype=WIDE), draw(INNER, seed=6, dtype=WIDE))
    plan = form.plan([site]).choose("s", bias=True)
    delta = form.build(site, plan).double()
    if start:
        moved(delta, seed=11).keep_start()
    moved(delta)
    x = draw(4, WIDTH, dtype=WIDE)
    got = delta.row_form().through(x, lambda h: base(delta, h))
    assert relative(got, wanted(delta, x)) <= 1e-6
    assert delta.bias_change().norm() > 0


def test_a_bias_alone_is_all_there_is_in_its_row_form():
    site = TensorSite("s", draw(INNER, WIDTH, dtype=WIDE), draw(INNER, seed=6, dtype=WIDE))
    delta = moved(BiasDelta(site).double())
    form = delta.row_form()
    assert torch.equal(form.db, delta.bias_change())
    assert torch.count_nonzero(form.B @ form.A) == 0


@pytest.mark.parametrize("form", [structures.DoRA(rank=2), structures.IA3(), fs.LoRA(rank=2)])
def test_a_layer_without_a_bias_gets_none(form):
    site = TensorSite("s", draw(INNER, WIDTH, dtype=WIDE))
    delta, x = moved(form.build(site, form.plan([site])).double()), draw(4, WIDTH, dtype=WIDE)
    row_form = delta.row_form()
    assert row_form.db is None
    got = row_form.through(x, lambda h: F.linear(h, site.weight()))
    assert relative(got, F.linear(x, site.weight() + update(delta))) <= 1e-6


def test_a_row_form_refuses_half_a_product_and_two_gains_at_other_strengths():
    with pytest.raises(InputError, match="has A and no B"):
        RowForm(A=torch.ones(1, 2))
    with pytest.raises(InputError, match="has B and no A"):
        RowForm(B=torch.ones(2, 1))
    both = RowForm(g_out=torch.ones(3), g_in=torch.ones(2))
    with pytest.raises(InputError, match="1 is exact"):
        both.at(0.5)
    assert both.at(1.0).g_in is not None


# --- row norms -------------------------------------------------------------------------------
@every()
@pytest.mark.parametrize("start", [False, True])
def test_row_norms_are_those_of_the_dense_update(case, start):
    delta = ready(case, start)
    got = delta.row_norms()
    assert not got.requires_grad
    same(got, torch.linalg.vector_norm(update(delta), dim=1).detach())


@every(factored)
@pytest.mark.parametrize("start", [False, True])
def test_row_norms_are_those_of_the_gated_update(case, start):
    delta = gated(ready(case, start))
    same(delta.row_norms(), torch.linalg.vector_norm(update(delta), dim=1).detach())


@every(lambda case: case.zero)
def test_row_norms_are_zero_at_the_start(case):
    assert torch.count_nonzero(case.delta().row_norms()) == 0


def test_row_norms_of_few_ranks_form_no_update(monkeypatch):
    form, site = fs.LoRA(rank=2), TensorSite("s", draw(INNER, WIDTH, dtype=WIDE))
    delta = moved(form.build(site, form.plan([site])).double())
    norms = torch.linalg.vector_norm(update(delta), dim=1).detach()

    def refused(w0):
        raise AssertionError("ΔW was formed")

    monkeypatch.setattr(delta, "dense", refused)
    same(delta.row_norms(), norms)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 1, 1), (1, 7, 1), (5, 3, 3), (3, 5, 3)])
def test_row_norms_at_any_size_and_of_zero_sides(sizes):
    out, inner, rank = sizes
    form, site = fs.LoRA(rank=rank), TensorSite("s", draw(out, inner, dtype=WIDE))
    delta = moved(form.build(site, form.plan([site])).double())
    same(delta.row_norms(), torch.linalg.vector_norm(update(delta), dim=1).detach())
    with torch.no_grad():
        delta.A.zero_()
    assert torch.equal(delta.row_norms(), torch.zeros(out, dtype=WIDE))


def test_an_update_of_no_ranks_has_norms_of_zero():
    delta = End(TensorSite("s", draw(WIDTH, WIDTH), kind="block"))
    x = draw(3, WIDTH)
    assert torch.equal(delta.row_norms(), torch.zeros(WIDTH))
    assert torch.equal(delta.row_form().through(x, torch.tanh), torch.tanh(x))
    assert delta.products() == []
