"""LSR-Adapt: what arXiv 2502.13568 and its algebra promise of the structure."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import draw, relative, stir
from torch import nn

import finespun as fs
from finespun.adapters.compact import compact
from finespun.contract import SiteShape, TensorSite
from finespun.errors import InputError
from finespun.kernels.kron import kron_rearrange
from finespun.linalg import LowRank, condition

WIDE = torch.float64


def built(form, out=48, n=36, dtype=torch.float32, name="s"):
    site = TensorSite(name, torch.zeros(out, n))
    return form.build(site, form.plan([site])).to(dtype)


def stirred(form, out=48, n=36, dtype=WIDE):
    delta = built(form, out, n, dtype)
    stir(list(delta.parameters()))
    return delta


def by_definition(factors):
    """Σ_k F1_k ⊗ F2_k (⊗ F3_k), term by term."""
    total = 0
    for term in zip(*factors):
        product = term[0]
        for factor in term[1:]:
            product = torch.kron(product, factor)
        total = total + product
    return total


@pytest.mark.parametrize(
    ("out", "n", "count"), [(768, 768, 3_584), (4096, 4096, 8_192), (11008, 4096, 10_944)]
)
def test_numbers_of_the_worked_sizes(out, n, count):
    assert fs.LSR().num_parameters(SiteShape("s", out, n)) == count


@given(
    st.integers(2, 40), st.integers(2, 40), st.integers(1, 6), st.integers(1, 4), st.integers(2, 3)
)
@settings(max_examples=40, deadline=None)
def test_factors_are_sums_of_kronecker_products_cut_to_size(out, n, rank, terms, count):
    rank = min(rank, out, n)
    split = (1, 1, rank) if count == 3 else None
    form = fs.LSR(rank=rank, separation_rank=terms, rank_split=split)
    delta = stirred(form, out, n)
    A, B = delta.low_rank()
    assert (A.shape, B.shape) == ((rank, n), (out, rank))
    assert relative(A, by_definition(delta.side("A"))[:, :n]) <= 1e-12
    assert relative(B, by_definition(delta.side("B"))[:out]) <= 1e-12
    assert sum(p.numel() for p in delta.parameters()) == form.num_parameters(delta.site.shape)
    x = draw(5, n, dtype=WIDE)
    assert relative(delta(x), delta.scale * (x @ A.T) @ B.T) <= 1e-11


def test_gradients_follow_the_published_formulas():
    """dB1 = G B2 Zᵀ, dB2 = Gᵀ B1 Z, H = Σ B1ᵀ G B2, dA1 = H A2 Xᵀ, dA2 = Hᵀ A1 X."""
    delta = stirred(fs.LSR(rank=4, separation_rank=3, alpha=4.0))
    (A1, A2), (B1, B2) = delta.side("A"), delta.side("B")
    x, g = draw(7, 36, dtype=WIDE), draw(7, 48, seed=1, dtype=WIDE)
    X = x.view(7, A1.shape[2], A2.shape[2])
    G = g.view(7, B1.shape[1], B2.shape[1])
    Z = torch.einsum("kai,tij,kbj->tab", A1, X, A2)
    H = torch.einsum("kua,tuv,kvb->tab", B1, G, B2)
    wanted = {
        "B1": torch.einsum("tuv,kvb,tab->kua", G, B2, Z),
        "B2": torch.einsum("tuv,kua,tab->kvb", G, B1, Z),
        "A1": torch.einsum("tab,kbj,tij->kai", H, A2, X),
        "A2": torch.einsum("tab,kai,tij->kbj", H, A1, X),
    }
    for path in (delta.forward, nn.Module.__call__.__get__(delta)):
        got = torch.autograd.grad((path(x) * g).sum(), [getattr(delta, n) for n in wanted])
        for a, b in zip(got, wanted.values()):
            assert relative(a, b) <= 1e-10
    A, B = delta.low_rank()
    formed = torch.autograd.grad(((x @ A.T) @ B.T * g).sum(), [getattr(delta, n) for n in wanted])
    for a, b in zip(formed, wanted.values()):
        assert relative(a, b) <= 1e-10


@pytest.mark.parametrize("start", ["balanced", "matched", "frames"])
@pytest.mark.parametrize("split", [None, (1, 2, 2)])
def test_only_the_last_factor_of_b_is_zero(start, split):
    delta = built(fs.LSR(rank=4, separation_rank=3, start=start, rank_split=split), dtype=WIDE)
    last = f"B{delta.count}"
    x, goal = draw(9, 36, dtype=WIDE), draw(9, 48, seed=1, dtype=WIDE)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        y = delta(x)
        assert step or torch.count_nonzero(y) == 0
        (y - goal).square().mean().backward()
        for name, p in delta.named_parameters():
            assert bool(p.grad.abs().sum() > 0) == (step == 1 or name == last), name
        optimizer.step()


@pytest.mark.parametrize("start", ["balanced", "matched", "frames"])
def test_the_start_gives_a_the_variance_of_loras(start):
    form = fs.LSR(start=start)
    total = 0.0
    for draw_number in range(100):
        A, _ = built(form, 768, 768, name=str(draw_number)).low_rank()
        total += float(A.detach().square().mean())
    assert math.sqrt(total / 100) == pytest.approx(1 / math.sqrt(3 * 768), rel=0.02)


def test_the_matched_start_has_frames_of_unit_expectation():
    delta = built(fs.LSR(start="frames"), 768, 768, WIDE)
    for side in ("A", "B"):
        F1 = delta.side(side)[0].detach().flatten(1)
        s, m = F1.shape
        assert relative(F1 @ F1.T, torch.eye(s, dtype=WIDE) * m / s) <= 1e-6


def test_the_official_start_reproduces_its_numbers():
    form = fs.LSR(start="official")
    assert form.scale == 4096
    assert fs.LSR(start="official", rank=16).scale == 2048
    assert not form.starts_at_zero
    delta = built(form, 768, 768)
    A, _ = delta.low_rank()
    assert [tuple(f.shape) for f in delta.side("A")] == [(16, 2, 32), (16, 2, 24)]
    assert float(A.detach().std()) == pytest.approx(4.0e-4, rel=0.1)
    assert float(delta.as_low_rank().norm()) == pytest.approx(1.0, rel=0.1)
    for factor in delta.parameters():
        assert float(factor.detach().std()) == pytest.approx(0.01, rel=0.1)


def test_export_is_exact():
    delta = stirred(fs.LSR(), 96, 80, torch.float32)
    x = draw(50, 80)
    exported = delta.as_low_rank()
    assert exported.rank == 4
    assert relative(delta(x), (x @ exported.A.T) @ exported.B.T) <= 1e-6


def test_an_awkward_width_is_padded():
    delta = stirred(fs.LSR(separation_rank=2), 1009, 1009, torch.float32)
    A, B = delta.low_rank()
    assert (A.shape, B.shape) == ((4, 1009), (1009, 4))
    assert delta.side("A")[0].shape[2] * delta.side("A")[1].shape[2] > 1009
    x = draw(3, 1009)
    assert relative(delta(x), delta.scale * (x @ A.T) @ B.T) <= 1e-6
    fresh = built(fs.LSR(separation_rank=2), 1009, 1009)
    assert torch.count_nonzero(fresh(x)) == 0
    assert fs.LSR().num_parameters(delta.site.shape) == 16 * 2 * 128


def test_three_factors():
    form = fs.LSR(rank=8, separation_rank=1, rank_split=(2, 2, 2))
    assert form.num_parameters(SiteShape("s", 4096, 4096)) == 2 * 96
    delta = stirred(form)
    assert delta.diagnostics() == {}
    for refused in (delta.rebalance, lambda: delta.project(delta.as_low_rank())):
        with pytest.raises(InputError, match="three Kronecker factors"):
            refused()


def test_rebalancing_keeps_the_update_and_sets_the_condition_to_one():
    delta = stirred(fs.LSR(separation_rank=3))
    with torch.no_grad():
        for side in ("A", "B"):
            P, Q = delta.side(side)
            Q[1] = -Q[0] + 0.01 * Q[1]
            P[1] = P[0]
    update, before = delta.dense(torch.zeros(48, 36)), delta.diagnostics()
    assert min(before.values()) > 1.4
    delta.rebalance()
    assert relative(delta.dense(torch.zeros(48, 36)), update) <= 1e-12
    for κ in delta.diagnostics().values():
        assert κ == pytest.approx(1, abs=1e-6)


def test_rebalancing_makes_rounding_to_half_precision_harmless():
    delta = stirred(fs.LSR(separation_rank=2), 64, 64)
    with torch.no_grad():
        P, Q = delta.side("A")
        P[1], Q[1] = P[0], -Q[0] + 0.0141 * Q[1]
    assert condition(P, Q).item() == pytest.approx(100, rel=0.3)

    def rounding():
        A, _ = delta.low_rank()
        rounded = [f.bfloat16().double() for f in delta.side("A")]
        return relative(by_definition(rounded), A)

    assert rounding() > 0.1
    delta.rebalance()
    assert rounding() < 0.005


@pytest.mark.parametrize("path", ["auto", "formed", "factorised"])
@pytest.mark.parametrize("formed", [True, False])
def test_the_way_with_fewer_operations_is_taken(path, formed):
    for rank, terms, split in ((4, 16, (2, 2)), (64, 4, (8, 8)), (64, 4, (1, 64)), (4, 16, (1, 4))):
        form = fs.LSR(rank=rank, separation_rank=terms, rank_split=split, path=path)
        delta = built(form, 768, 1024)
        (r1, r2), (p1, p2), (q1, q2) = (delta.choice[k] for k in ("ranks", "down", "up"))
        down = min(r1 * p2 * (p1 + r2), r2 * p1 * (p2 + r1))
        up = min(q1 * r2 * (r1 + q2), q2 * r1 * (r2 + q1))
        for tokens in (1, 2, 3, 8, 1000):
            factorised = tokens * terms * (down + up)
            through = (tokens + (0 if formed else terms)) * rank * (768 + 1024)
            expected = {"auto": factorised < through, "formed": False, "factorised": True}[path]
            assert delta.direct(tokens, formed) == expected


def test_the_paper_configuration_forms_from_three_rows_on():
    delta = built(fs.LSR(), 768, 768)
    assert [delta.direct(tokens, False) for tokens in (1, 2, 3, 4)] == [True, True, False, False]
    assert not any(delta.direct(tokens, True) for tokens in (1, 2, 3))


@pytest.mark.parametrize("terms", [1, 5, 12])
def test_projection_error_is_the_tail_of_the_rearranged_singular_values(terms):
    A0 = draw(4, 36, seed=1, dtype=WIDE)
    update = LowRank(A0, draw(48, 4, seed=2, dtype=WIDE))
    delta = built(fs.LSR(separation_rank=terms), dtype=WIDE)
    error = delta.project(update)
    got = delta.as_low_rank().dense()
    assert error == pytest.approx(relative(got, update.dense()), rel=1e-8, abs=1e-7)
    balanced = update.squeeze(4)
    (r1, r2), (p1, p2) = delta.choice["ranks"], delta.choice["down"]
    σ = torch.linalg.svdvals(kron_rearrange(balanced.A, r1, r2, p1, p2))
    A, _ = delta.low_rank()
    tail = float(σ[terms:].square().sum())
    scale = float((A.detach() * balanced.A).sum() / A.detach().square().sum())
    own = float((scale * A.detach() - balanced.A).square().sum())
    assert own == pytest.approx(tail, rel=1e-8, abs=1e-12)


def test_projection_with_all_terms_is_exact_and_refining_lowers_the_error():
    update = LowRank(draw(4, 36, seed=1, dtype=WIDE), draw(48, 4, seed=2, dtype=WIDE))
    full = built(fs.LSR(separation_rank=16), dtype=WIDE)
    assert full.project(update) < 1e-7
    assert relative(full.as_low_rank().dense(), update.dense()) < 1e-12
    plain, refined = (built(fs.LSR(separation_rank=5), dtype=WIDE) for _ in range(2))
    before, after = plain.project(update), refined.project(update, refine=50)
    assert after < 0.999 * before
    assert relative(refined.as_low_rank().dense(), update.dense()) == pytest.approx(after, rel=1e-6)


def test_compact_after_terms_were_switched_off():
    form = fs.LSR(separation_rank=4)
    delta = stirred(form)
    plan = form.plan([delta.site])
    groups = {g.label: g for g in delta.groups("term")}
    assert len(groups) == 8
    for label in ("A term 1", "B term 0", "B term 3"):
        delta.switch_off(groups[label])
    assert len(delta.live("term")) == 5
    update = delta.dense(torch.zeros(48, 36))
    new_form, new_plan, small = compact(form, plan, {"s": delta})
    assert new_form == form
    assert new_plan.choices["s"]["terms"] == [3, 2]
    assert small["s"].A1.shape[0] == 3
    assert small["s"].B2.shape[0] == 2
    assert relative(small["s"].double().dense(torch.zeros(48, 36)), update) <= 1e-6
    again = form.build(delta.site, new_plan)
    again.load_state_dict(small["s"].state_dict())
    assert torch.equal(again.A1, small["s"].A1.to(again.A1.dtype))


def test_a_gate_turns_it_into_a_lora_when_compacted():
    form = fs.LSR(separation_rank=4)
    delta = stirred(form, dtype=torch.float32)
    delta.set_gate(torch.tensor([1.0, 0.0, 0.5, 0.0]))
    update = delta.dense(torch.zeros(48, 36))
    new_form, new_plan, small = compact(form, form.plan([delta.site]), {"s": delta})
    assert new_form.kind == "lora"
    assert new_plan.choices["s"] == {"rank": 2, "scale": 1.0}
    assert relative(small["s"].dense(torch.zeros(48, 36)), update) <= 1e-6


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"separation_rank": 0}, "separation_rank=0"),
        ({"start": "zero"}, "'zero'.*balanced"),
        ({"path": "fast"}, "'fast'.*formed"),
        ({"rank": 6, "rank_split": (2, 2)}, r"\(2, 2\).*rank=6"),
        ({"rank": 6, "start": "official"}, "rank=6.*rank=4"),
        ({"rank": 8, "rank_split": (2, 2, 2), "path": "factorised"}, "path='formed'"),
    ],
)
def test_bad_options_are_refused(options, shown):
    with pytest.raises(InputError, match=shown):
        fs.LSR(**options)


def toy(form, rate, seed=0, zero=False, steps=400):
    """Relative error after learning an LSR teacher of norm 1 on 96 x 96 from random inputs."""
    g = torch.Generator().manual_seed(seed)
    teacher = built(fs.LSR(rank_split=(2, 2), separation_rank=6), 96, 96)
    with torch.no_grad():
        for p in teacher.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    target = teacher.as_low_rank().dense()
    target /= target.norm()
    delta = built(form, 96, 96)
    if zero:
        nn.init.zeros_(delta.B1)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        x = torch.randn(32, 96, generator=g)
        optimizer.zero_grad()
        (delta(x) - x @ target.T).square().sum(-1).mean().backward()
        optimizer.step()
        schedule.step()
    return relative(delta.as_low_rank().dense(), target)


def test_a_teacher_of_the_same_form_is_learnt():
    small = {"rank_split": (2, 2), "separation_rank": 6}
    assert toy(fs.LSR(alpha=4.0, **small), 1e-2) < 0.1
    assert toy(fs.LoRA(rank=4, alpha=4.0), 1e-2) < 0.01
    assert toy(fs.LSR(alpha=4.0, **small), 1e-2, zero=True) == pytest.approx(1.0, abs=1e-6)
    official = fs.LSR(start="official", separation_rank=6)
    assert official.scale == 4096
    assert toy(official, 5e-2) > 0.5
    assert toy(fs.LSR(alpha=4.0, **small), 5e-2) < 0.01
