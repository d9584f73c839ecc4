"""SHiRA against its definition, PEFT, and the facts of arXiv 2406.13175."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import Sizes, adapted, built, fingerprint, moved, outputs_agree, peft, rank, site, update

from finespun.contract import Need, SiteShape
from finespun.errors import InputError, PlanError, StateError
from finespun.kernels.entries import Entries
from finespun.methods.structures import LoRA, SHiRA

MASKS = ("random", "structured", "magnitude", "gradient", "snip", "given")
DRAWN = ("random", "structured")


def chosen(form, *sites):
    """As `moved`, with scores that are normal where the mask needs some."""
    deltas = moved(form, *sites)
    g = torch.Generator().manual_seed(5)
    for delta, where in zip(deltas, sites):
        v = delta.v.detach().clone()
        scores = torch.randn(*where.value.shape, generator=g, dtype=torch.float64)
        if form.mask == "given":
            delta.select(scores)
        elif Need.GRADIENTS in form.needs:
            delta.start_from(scores)
        delta.v.data = v
    return deltas


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_only_the_chosen_entries_move(mask, shape):
    (delta,) = chosen(SHiRA(rank=2, mask=mask), site(*shape))
    W = update(delta)
    assert torch.equal(W.flatten().nonzero()[:, 0], delta.index)
    torch.testing.assert_close(W.flatten()[delta.index], delta.v.detach())
    for rows in (1, 2, 50):
        x = torch.randn(rows, shape[1]).double()
        torch.testing.assert_close(delta(x), x @ W.T)


def test_the_gradient_is_the_dense_one_at_the_entries():
    where = site(30, 20)
    (delta,) = moved(SHiRA(rank=2), where)
    for rows in (1, 50):
        x, G = torch.randn(rows, 20).double(), torch.randn(rows, 30).double()
        (grad,) = torch.autograd.grad((delta(x) * G).sum(), delta.v)
        torch.testing.assert_close(grad, (G.T @ x).flatten()[delta.index])


def test_training_values_is_training_masked_weights():
    where = site(12, 10)
    (delta,), _, _ = built(SHiRA(rank=2), where)
    delta.double()
    W = where.value.clone().requires_grad_()
    mask = torch.zeros(120, dtype=torch.float64)
    mask[delta.index] = 1
    x, y = torch.randn(64, 10).double(), torch.randn(64, 12).double()
    ours, theirs = torch.optim.SGD([delta.v], lr=0.1), torch.optim.SGD([W], lr=0.1)
    for _ in range(20):
        for optimizer, weight in ((ours, delta.map_weight(where.value)), (theirs, W)):
            optimizer.zero_grad()
            (x @ weight.T - y).square().mean().backward()
            if weight is W:
                W.grad *= mask.view(12, 10)
            optimizer.step()
    torch.testing.assert_close(delta.map_weight(where.value), W)
    assert torch.equal(W[mask.view(12, 10) == 0], where.value[mask.view(12, 10) == 0])


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("rank", [1, 6])
def test_no_gradient_of_the_whole_weight_is_formed(rank, rows):
    """Counted: no tensor of out x in parameters is made in a forward and backward pass of a sparse
    mask (rank 1); of a dense one, only ΔW and its gradient."""
    where = site(64, 48)
    (delta,) = moved(SHiRA(rank=rank), where)
    x = torch.randn(rows, 48).double().requires_grad_()
    with Sizes() as sizes:
        delta(x).square().sum().backward()
    whole = [n for n in sizes.found if n >= 64 * 48]
    assert bool(whole) == (10 * len(delta.v) > 64 * 48) == (rank == 6)
    assert delta.v.grad.shape == (rank * 112,)


def test_a_lora_of_that_budget_has_rank_one_but_this_nearly_all():
    for n, least in ((64, 0.7), (128, 0.75), (256, 0.75)):
        (delta,) = moved(SHiRA(rank=1), site(n, n))
        assert rank(delta) >= least * n
    (delta,) = moved(SHiRA(rank=2), site(128, 128))
    assert rank(delta) >= 0.95 * 128
    (delta,) = moved(SHiRA(rank=1, mask="structured"), site(64, 48))
    assert rank(delta) == 48


def test_magnitude_takes_the_largest_and_skips_what_others_took():
    where = site(30, 20)
    order = where.value.abs().flatten().argsort(descending=True)
    for skip in (0, 1, 3):
        (delta,), _, _ = built(SHiRA(rank=2, mask="magnitude", skip=skip), where)
        assert set(delta.index.tolist()) == set(order[100 * skip : 100 * (skip + 1)].tolist())


def squared(where, x, y):
    """The gradient of a linear regression's squared error."""
    W = where.value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((x @ W.T - y).square().sum(), W)
    return gradient


@pytest.mark.parametrize("mask", ["gradient", "snip", "given"])
def test_scores_choose_the_entries(mask):
    """SNIP and gradient on a linear regression: the set that brute force finds."""
    where = site(30, 20)
    G = squared(where, torch.randn(50, 20).double(), torch.randn(50, 30).double())
    (delta,), _, _ = built(SHiRA(rank=2, mask=mask), where)
    delta.v.data.fill_(1.0)
    (delta.select if mask == "given" else delta.start_from)(G)
    scores = (where.value * G if mask == "snip" else G).abs().flatten().tolist()
    best = sorted(range(600), key=lambda i: -scores[i])[:100]
    assert delta.index.tolist() == sorted(best)
    assert delta.v.detach().norm() == 0


def test_a_boolean_mask_is_taken_as_it_is():
    (delta,), _, _ = built(SHiRA(rank=2, mask="given"), site(30, 20))
    mask = torch.zeros(600, dtype=torch.bool)
    mask[7:107] = True
    delta.select(mask.view(30, 20))
    assert delta.index.tolist() == list(range(7, 107))
    for wrong in (99, 101):
        mask[:] = False
        mask[:wrong] = True
        with pytest.raises(InputError, match=rf"'site' have {wrong} .* for 100 to be chosen"):
            delta.select(mask.view(30, 20))


@pytest.mark.parametrize("mask", ["gradient", "snip", "given"])
def test_training_before_the_entries_are_chosen_is_refused(mask):
    where = site(30, 20)
    (delta,), _, _ = built(SHiRA(rank=2, mask=mask), where)
    delta.double().train()
    x = torch.randn(3, 20).double()
    with pytest.raises(StateError, match=f"mask='{mask}'.*'site' are not chosen yet; call"):
        delta(x)
    with pytest.raises(StateError, match="not chosen yet"):
        delta.delta(where.value)
    with torch.no_grad():
        assert delta(x).abs().max() == 0
    delta.eval()
    assert delta(x).abs().max() == 0
    (delta.select if mask == "given" else delta.start_from)(torch.randn(30, 20))
    delta.train()
    assert delta(x).requires_grad


@pytest.mark.parametrize("mask", MASKS)
def test_what_a_seed_cannot_draw_again_is_saved(mask):
    form = SHiRA(rank=2, mask=mask)
    (delta,) = chosen(form, site(30, 20))
    assert ("entries" in delta.state_dict()) == (mask not in DRAWN)
    assert delta.per_sample == (mask in DRAWN)
    (again,), _, _ = built(form, site(30, 20, seed=99))
    again.double().load_state_dict(delta.state_dict())
    assert torch.equal(update(again), update(delta))


def test_masks_differ_between_sites_and_seeds_and_never_between_runs():
    """PEFT seeds every layer alike, and "unseeded" masks are the same in every run."""
    one, two = built(SHiRA(rank=2), site(30, 20, "a"), site(30, 20, "b"))[0]
    (three,), _, _ = built(SHiRA(rank=2, seed=1), site(30, 20, "a"))
    assert not torch.equal(one.index, two.index)
    assert not torch.equal(one.index, three.index)
    assert fingerprint(one.index) == "df87fb3e106c520b"


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_counts_of_the_structured_mask(out, inner, r):
    form, where = SHiRA(rank=r, mask="structured"), site(out, inner)
    if r * (out + inner) > out * inner:
        return
    (delta,), _, _ = built(form, where)
    count = len(delta.index)
    assert count == form.num_parameters(where.shape) <= r * (out + inner)
    mask = torch.zeros(out * inner, dtype=torch.bool)
    mask[delta.index] = True
    mask = mask.view(out, inner)
    assert mask.diagonal().all()
    lines = mask.all(1 if out <= inner else 0).sum()
    assert count == lines * (max(out, inner) - 1) + min(out, inner)


def test_sparse_adapters_hardly_overlap_and_loras_wholly():
    """AWOR of the paper, at n = 512."""
    sites = site(512, 512, "a"), site(512, 512, "b")
    structured = moved(SHiRA(rank=5, mask="structured"), *sites)
    random, loras = moved(SHiRA(rank=2), *sites), moved(LoRA(rank=2), *sites)
    assert apart(*structured) >= 0.9
    assert apart(*random) >= 0.9
    assert apart(*loras) == 0


def apart(one, two):
    """1 − ‖S1ᵀ S2‖₀ / in²: the share of pairs of inputs that move no output in common."""
    return 1 - float((update(one).T @ update(two)).ne(0).double().mean())


def test_outputs_are_pefts():
    from peft import ShiraConfig

    layer = peft(ShiraConfig(r=2), (24, 16), bias=True).fc0
    ours, delta = adapted(SHiRA(rank=2, mask="given"), layer)
    rows, columns = layer.shira_indices["default"].long()
    order = (rows * 16 + columns).argsort()
    delta.entries.copy_((rows * 16 + columns)[order])
    delta.v.data.copy_(layer.shira_weight["default"][order])
    assert outputs_agree(ours, layer) <= 1e-5


def test_counts():
    form = SHiRA(rank=32)
    shapes = SiteShape("q", 3072, 3072), SiteShape("v", 1024, 3072)
    assert 28 * sum(form.num_parameters(s) for s in shapes) == 9_175_040
    assert form.flops(shapes[0], 1) == 2 * 32 * 6144
    assert form.flops(shapes[0], 512) == 2 * 512 * 32 * 6144
    assert SHiRA(rank=400).flops(shapes[0], 512) == 2 * 512 * 3072**2


def test_what_cannot_be_is_named():
    with pytest.raises(PlanError, match=r"rank=32.*704 of the 120.*'site' \(12x10\).*rank=5"):
        SHiRA().plan([site(12, 10)])
    with pytest.raises(PlanError, match=r"at most rank=2"):
        SHiRA(rank=3, mask="magnitude", skip=1).plan([site(12, 10)])
    with pytest.raises(InputError, match=r"mask='grad'.*'gradient', 'snip' or 'given'"):
        SHiRA(mask="grad")
    (given,), _, _ = built(SHiRA(rank=2, mask="given"), site(30, 20))
    with pytest.raises(InputError, match=r"'site' are \(20, 30\), expected \(30, 20\)"):
        given.select(torch.randn(20, 30))
    with pytest.raises(InputError, match=r"'site' are not all finite"):
        given.select(torch.full((30, 20), float("nan")))
    with pytest.raises(InputError, match=r"'site' have 0 entries that are not zero, for 100"):
        given.select(torch.zeros(30, 20))
    with pytest.raises(StateError, match=r"mask='given' does not look at gradients; try 'snip'"):
        given.start_from(torch.randn(30, 20))
    (drawn,), _, _ = built(SHiRA(rank=2), site(30, 20))
    with pytest.raises(StateError, match="EntriesDelta does not start from gradients"):
        drawn.start_from(torch.randn(30, 20))
    with pytest.raises(InputError, match=r"skip=1.*magnitude"):
        SHiRA(skip=1)


def test_places_beyond_int32():
    """Flat places of a weight of 2.8·10⁹ numbers: the same rows and columns as counted by hand."""
    index = torch.tensor([3, 2**31 + 5, 70_000 * 40_000 - 1])
    at = Entries(index, (70_000, 40_000))
    wanted = [divmod(i, 40_000) for i in index.tolist()]
    found = at.matrix(torch.ones(3)).to_sparse_coo().indices().T.tolist()
    assert [tuple(pair) for pair in found] == wanted


def test_as_a_lora_it_is_the_nearest():
    """PEFT refuses to write one; here the lost share of the norm is that of the tail."""
    (delta,) = moved(SHiRA(rank=1), site(30, 20))
    S = torch.linalg.svdvals(update(delta))
    near = delta.as_low_rank(4)
    lost = (near.dense() - update(delta)).norm()
    assert float(lost) == pytest.approx(float(S[4:].norm()), rel=1e-6)


def test_hooks_of_the_layer_are_called():
    """PEFT calls the functional form with another weight, past hooks on the base layer."""
    from peft import ShiraConfig

    layer = peft(ShiraConfig(r=1), (24, 16)).fc0
    ours, _ = adapted(SHiRA(rank=1), layer)
    called = []
    ours.register_forward_hook(lambda *_: called.append("ours"))
    layer.base_layer.register_forward_hook(lambda *_: called.append("theirs"))
    x = torch.randn(2, 16)
    ours(x)
    with pytest.warns(UserWarning, match="hooks set which will be ignored"):
        layer(x)
    assert called == ["ours"]
