"""What every start is, in float64: the identities of its paper."""

import warnings

import pytest
import torch
from safetensors.torch import save_file
from starts import adapted, cosine, loss, net, place, rows
from suite import draw

import finespun as fs
from finespun.contract.calculus import pull, push
from finespun.driver import estimate_gradients
from finespun.errors import InputError
from finespun.linalg import nearest_sides
from finespun.methods.initializers.pieces.alignment import align, step_cosine

W = draw(20, 24, seed=3, dtype=torch.float64)
G = draw(20, 24, seed=4, dtype=torch.float64)
X = draw(60, 24, seed=5, dtype=torch.float64)
SCALES = [0.5, 1.0, 3.0]


def singular(M):
    return torch.linalg.svdvals(M)


# --- parts of the weight --------------------------------------------------------------------------
@pytest.mark.parametrize("s", SCALES)
def test_pissa_is_the_best_of_its_rank(s):
    A, B = fs.PiSSA().factors(place(W, scale=s))
    left = W - s * B @ A
    assert float(left.norm()) == pytest.approx(float(singular(W)[4:].norm()), rel=1e-12)
    torch.testing.assert_close(B.mT @ B, A @ A.mT)
    A, B = fs.PiSSA(niter=16).factors(place(W, scale=s))
    torch.testing.assert_close(W - s * B @ A, left, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("s", SCALES)
def test_milora_is_the_least_part(s):
    A, B = fs.MiLoRA().factors(place(W, scale=s))
    assert float((s * B @ A).norm()) == pytest.approx(float(singular(W)[-4:].norm()), rel=1e-12)
    torch.testing.assert_close(singular(W - s * B @ A)[:16], singular(W)[:16])


def test_a_weight_without_a_least_part_is_no_saddle():
    low = draw(20, 6, seed=1, dtype=torch.float64) @ draw(6, 24, seed=2, dtype=torch.float64)
    one = place(low)
    A, B = fs.MiLoRA().factors(one)
    assert float(A.norm()) > 0 < float(B.norm())
    assert "raised" in fs.MiLoRA().settle(one, (A, B), 0.0)[0]
    assert fs.MiLoRA().settle(place(W), fs.MiLoRA().factors(place(W)), 0.0) == []


@pytest.mark.parametrize("s", SCALES)
def test_olora_is_the_projection_on_the_first_columns(s):
    first = torch.linalg.qr(W[:, :4])[0]
    A, B = fs.OLoRA().factors(place(W, scale=s))
    torch.testing.assert_close(B @ A, first @ first.mT @ W)
    torch.testing.assert_close((W - B @ A)[:, :4], torch.zeros(20, 4, dtype=W.dtype))
    A, B = fs.OLoRA(unit=True).factors(place(W, scale=s))
    torch.testing.assert_close(s * B @ A, first @ first.mT @ W)


def test_orthogonal_factors_cancel():
    A, B = fs.Orthogonal().factors(place(W))
    assert float((B @ A).norm()) < 1e-6 * float(A.norm() * B.norm())
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 2


# --- by what the layer reads ----------------------------------------------------------------------
def test_eva_reads_the_main_directions():
    x = X + 0.5
    C, mean = x.mT @ x / 60, x.mean(0)
    A, B = fs.EVA().factors(place(W, covariance=C))
    kept = torch.linalg.svd(x)[2][:4]
    torch.testing.assert_close(A.mT @ A, kept.mT @ kept)
    assert not B.any()
    A = fs.EVA(center=True).factors(place(W, covariance=C, mean=mean))[0]
    kept = torch.linalg.svd(x - mean)[2][:4]
    torch.testing.assert_close(A.mT @ A, kept.mT @ kept)


@pytest.mark.parametrize("s", SCALES)
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_the_best_fit_of_the_weighted_weight(s, mode):
    form, C = fs.CorDA(mode=mode), X.mT @ X / 60
    A, B = form.factors(place(W, scale=s, covariance=C))
    damped = form.damped(C)[0]
    S = singular(W @ damped)
    held = float(((s * B @ A) @ damped).norm())
    part = S[:4] if mode == "ipm" else S[-4:]
    assert held == pytest.approx(float(part.norm()), rel=1e-9)
    other = form.factors(place(W, scale=s, covariance=1e-4 * C))
    torch.testing.assert_close(other[1] @ other[0], B @ A)


def test_corda_inverts_what_is_singular():
    few = X[:3]
    A, B = fs.CorDA().factors(place(W, covariance=few.mT @ few / 3))
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()


# --- LoRA-GA --------------------------------------------------------------------------------------
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_lora_ga_is_nearest_to_the_gradient_for_every_split(direction):
    low = G @ torch.diag(0.7 ** torch.arange(24, dtype=G.dtype))
    A, B = fs.LoRAGA(direction=direction).factors(place(W, gradient=low))
    k = 20**0.25 / 4
    eye = torch.eye(4, dtype=G.dtype) * k**2
    for found in (A @ A.mT, B.mT @ B):
        torch.testing.assert_close(found, eye, rtol=1e-6, atol=1e-7)
    assert float((B.mT @ low @ A.mT).norm()) < 1e-6 * float(low.norm())
    residual = (low @ A.mT @ A + B @ B.mT @ low) / k**2 - low
    assert float(residual.norm()) == pytest.approx(float(singular(low)[8:].norm()), rel=1e-4)


def test_the_size_of_the_loss_does_not_matter():
    for seed, factor in enumerate((1e-3, 1e3)):
        form = fs.LoRAGA(gamma=2.0 + seed)
        first = form.factors(place(W, gradient=G))
        second = form.factors(place(W, gradient=factor * G))
        torch.testing.assert_close(second[1] @ second[0], first[1] @ first[0])


@pytest.mark.parametrize("s", SCALES)
def test_lora_ga_scales(s):
    wanted = {
        "stable": 20**0.25 / 4,
        "unit": 1.0,
        "gd": 1 / s,
        "weight": float((singular(W)[:4] / s).sqrt().mean()),
    }
    for scale_by, k in wanted.items():
        A, B = fs.LoRAGA(scale_by=scale_by).factors(place(W, scale=s, gradient=G))
        assert float(A.norm()) == pytest.approx(2 * k, rel=1e-3)
        assert float(B.norm()) == pytest.approx(2 * k, rel=1e-3)


def test_fewer_directions_than_two_ranks_overlap_and_none_is_told():
    thin = place(W[:6], gradient=G[:6])
    A, B = fs.LoRAGA().factors(thin)
    assert (A.shape, B.shape) == ((4, 24), (6, 4))
    assert fs.LoRAGA().factors(place(W, gradient=0 * G)) is None


@pytest.mark.parametrize("structure", [fs.LoRA(rank=4), fs.LSR(rank=4, separation_rank=3)])
def test_the_first_step_is_what_the_cosine_says(structure):
    """−t·J Jᵀ G by the calculus against a step of gradient descent, in float64."""
    one = place(W, structure=structure, gradient=G)
    for parameter in one.delta.parameters():
        parameter.data = draw(*parameter.shape, seed=8, dtype=W.dtype) / 3
    moved = push(one.delta, pull(one.delta, G)).dense()
    assert float(step_cosine(one.delta, G)) == pytest.approx(cosine(moved, G), rel=1e-10)
    before, t = one.delta.dense(W).detach(), 1e-8
    with torch.no_grad():
        for name, slope in pull(one.delta, G).items():
            one.delta.get_parameter(name).sub_(t * slope)
    change = (one.delta.dense(W).detach() - before) / -t
    torch.testing.assert_close(change, moved, rtol=1e-4, atol=1e-3)


def test_lsr_follows_better_after_refinement():
    low = draw(96, 4, seed=1, dtype=torch.float64) @ draw(4, 96, seed=2, dtype=torch.float64)
    noisy = low + 0.3 * draw(96, 96, seed=3, dtype=torch.float64)
    structure = fs.LSR(rank=4, separation_rank=8)
    one = place(torch.eye(96, dtype=torch.float64), structure=structure, gradient=noisy)
    plain = float(step_cosine(one.delta, noisy))
    A, B = fs.LoRAGA().factors(one)
    one.delta.take_factors(A, B, apart=True)
    near = float(step_cosine(one.delta, noisy))
    sizes = [float(t.detach().norm()) for t in one.delta.low_rank()]
    best = align(one.delta, noisy, 50)
    assert plain < near < best
    assert best > 0.8
    assert [float(t.detach().norm()) for t in one.delta.low_rank()] == pytest.approx(
        sizes, rel=1e-6
    )


# --- nearest sides --------------------------------------------------------------------------------
@pytest.mark.parametrize("apart", [False, True])
def test_turning_the_ranks_never_makes_the_sides_worse(apart):
    A, B = draw(4, 24, seed=1, dtype=torch.float64), draw(40, 4, seed=2, dtype=torch.float64)
    shape = ((2, 2), (4, 6), (5, 8), (2, 2))
    errors = []
    for rounds in (1, 2, 4, 12):
        found = nearest_sides(A, B, *shape, apart=apart, rounds=rounds)
        left = torch.einsum("kai,kbj->abij", *found.A).reshape(4, 24)
        right = torch.einsum("kai,kbj->abij", *found.B).reshape(40, 4)
        errors.append(off(left, A) + off(right.mT, B.mT))
        if apart:
            assert float(left.norm()) == pytest.approx(float(A.norm()))
    if apart:
        assert errors[-1] < errors[0]
    else:
        assert errors[-1] <= errors[0] + 1e-9
    whole = nearest_sides(A, B, *shape[:3], (8, 10))
    assert whole.error < 1e-7


def off(near, M):
    """min ‖near − Q M‖² over orthogonal Q."""
    return float(near.norm() ** 2 + M.norm() ** 2 - 2 * singular(near @ M.mT).sum())


# --- LoRA-SB --------------------------------------------------------------------------------------
XS = fs.LoRAXS(rank=4, start="gradient")


def begun(step=1e-3, **options):
    model = net()
    with pytest.warns(UserWarning, match="lora_sb moves the start"):
        adapter = adapted(model, XS, fs.LoRASB(step=step, **options))
    return model, adapter


def test_lora_sb_is_the_best_of_rank_r_of_the_first_full_step():
    model, adapter = begun()
    found = estimate_gradients(net(), ["0", "2"], [rows()], loss)
    for name, delta in adapter.deltas.items():
        D = -1e-3 * found[name].sign()
        A, B = delta.basis()
        torch.testing.assert_close(A @ A.mT, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(B.mT @ B, torch.eye(4), atol=1e-5, rtol=0)
        left = D - delta.dense(D).detach()
        assert float(left.norm()) == pytest.approx(float(singular(D)[4:].norm()), rel=1e-3)
        assert delta.R.numel() == 16
    assert all(torch.equal(p, q) for p, q in zip(net().parameters(), base_of(model)))


def base_of(model):
    return [model[i].get_parameter(n) for i in (0, 2, 4) for n in ("weight", "bias")]


@pytest.mark.parametrize("basis", ["sign", "gradient"])
@pytest.mark.parametrize("step", [1e-3, 1e-2, 10.0])
def test_the_loss_never_begins_above_the_bases(basis, step):
    model, _ = begun(step, basis=basis)
    assert float(loss(model, rows())) <= float(loss(net(), rows())) * (1 + 1e-6)


def test_the_best_core_gradient_is_the_gradient_itself():
    """s B g_R A = P_B G P_A for orthonormal sides and s = 1."""
    Q1, Q2 = (torch.linalg.qr(t)[0][:, :4] for t in (G, G.mT))
    one = place(W, structure=XS)
    one.delta.set_basis(Q2.mT, Q1)
    g = pull(one.delta, G)["R"]
    torch.testing.assert_close(Q1 @ g @ Q2.mT, Q1 @ Q1.mT @ G @ Q2 @ Q2.mT)


@pytest.mark.parametrize("structure", [fs.LoRA(), fs.LoRAXS(), fs.LSR()])
def test_lora_sb_is_for_lora_xs_alone(structure):
    with pytest.raises(InputError, match="start: gradient"):
        fs.LoRASB().suits(structure)


# --- LoftQ and other adapters ---------------------------------------------------------------------
def coarse(model):
    """The model with weights rounded to sixteenths."""
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_((layer.weight * 16).round() / 16)
    return model


@pytest.mark.parametrize("alpha", [4.0, 12.0])
def test_loftq_gives_back_what_rounding_took(alpha, tmp_path):
    save_file(dict(net().state_dict()), tmp_path / "model.safetensors")
    model = coarse(net())
    with pytest.warns(UserWarning, match="loftq moves the start"):
        adapter = adapted(
            model, fs.LoRA(rank=4, alpha=alpha), fs.LoftQ(weights=str(tmp_path)), batches=[]
        )
    for name, i in (("0", 0), ("2", 2)):
        lost = net()[i].weight - coarse(net())[i].weight
        left = lost - adapter.deltas[name].dense(lost)
        tail = float(singular(lost.detach())[4:].norm())
        assert float(left.norm()) == pytest.approx(tail, rel=1e-4)
    with pytest.raises(InputError, match="nothing was lost"):
        adapted(net(), fs.LoRA(rank=4), fs.LoftQ(weights=str(tmp_path)), batches=[])


@pytest.mark.parametrize("structure", [fs.LoRA(rank=5), fs.LSR(rank=4, separation_rank=8)])
def test_an_adapter_goes_on_in_another_structure(structure, tmp_path):
    first = net()
    adapter = fs.adapt(first, fs.LoRA(rank=4), ["0", "2"], [])
    for parameter in adapter.parameters():
        parameter.data.copy_(draw(*parameter.shape, seed=6) / 10)
    adapter.save(tmp_path / "first")
    model, start = net(), fs.FromAdapter(adapter=str(tmp_path / "first"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        begun = adapted(model, structure, start, batches=[])
    assert any("from_adapter moves the start" in str(one.message) for one in told)
    x = rows(7)[0]
    if structure.kind == "lora":
        torch.testing.assert_close(model(x), first(x), rtol=1e-4, atol=1e-5)
    else:
        assert float((model(x) - first(x)).norm()) < float((net()(x) - first(x)).norm())
    assert len(begun.deltas) == 2
    with pytest.raises(InputError, match="does not adapt '4'"):
        adapted(net(), structure, start, batches=[], layers=["0", "4"])
