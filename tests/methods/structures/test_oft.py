"""OFT against its definition, PEFT, and the invariants of arXiv 2306.07280."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import Layers, adapted, moved, outputs_agree, peft, rank, site, update
from torch import nn

import finespun as fs
from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.methods.structures import IA3, OFT
from finespun.methods.structures.oft import cayley


def small(delta, size=0.3):
    delta.s.data.mul_(size / delta.s.abs().max())
    return delta


def test_the_blocks_are_rotations_of_the_inputs():
    where = site(12, 20)
    (delta,) = moved(OFT(block_size=5), where)
    R = torch.block_diag(*(delta.turn().detach() + torch.eye(5).double()))
    torch.testing.assert_close(R @ R.T, torch.eye(20).double())
    assert float(torch.linalg.det(R)) == pytest.approx(1.0)
    torch.testing.assert_close(update(delta), where.value @ R.T - where.value)


def test_norms_and_angles_between_rows_stay():
    (delta,) = moved(OFT(block_size=20), site(12, 20))
    w0 = delta.base_weight()
    W = delta.map_weight(w0)
    torch.testing.assert_close(W @ W.T, w0 @ w0.T)
    assert rank(delta) == 12


@given(st.integers(2, 7), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_cayley_is_its_formula(b, seed):
    X = torch.randn(3, b, b, generator=torch.Generator().manual_seed(seed)).double()
    S, eye = X - X.mT, torch.eye(b).double()
    torch.testing.assert_close(cayley(S) + eye, (eye + S) @ torch.linalg.inv(eye - S))


@pytest.mark.parametrize("terms", [3, 4, 5, 8])
def test_the_series_is_a_truncation_of_the_exact_rotation(terms):
    (delta,) = moved(OFT(block_size=6), site(8, 12))
    S = small(delta).skew().detach()
    eye = torch.eye(6).double()
    inverse = sum(torch.linalg.matrix_power(S, k) for k in range(terms - 1))
    torch.testing.assert_close(cayley(S, terms) + eye, (eye + S) @ inverse)


def test_the_series_converges_to_the_exact_rotation_not_to_its_transpose():
    """PEFT 0.21.2: use_cayley_neumann=False turns the other way than the series."""
    (delta,) = moved(OFT(block_size=6), site(8, 12))
    S = 0.1 * small(delta).skew().detach()
    torch.testing.assert_close(cayley(S, 40), cayley(S), rtol=0, atol=1e-12)
    assert float((cayley(S, 40) - cayley(-S)).norm()) > 0.1


@pytest.mark.parametrize("series", [True, False])
def test_outputs_are_pefts(series):
    from peft import OFTConfig

    config = OFTConfig(oft_block_size=4, use_cayley_neumann=series, num_cayley_neumann_terms=5)
    layer = peft(config, (24, 16), bias=True).fc0
    ours, delta = adapted(OFT(block_size=4, neumann=5 if series else 0), layer)
    stored = layer.oft_R["default"].weight
    delta.s.data.copy_(stored if series else -stored)
    assert outputs_agree(ours, layer) <= 1e-5


@pytest.mark.parametrize("neumann", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_bit_for_bit(dtype, neumann):
    model = Layers((40, 24), bias=True).to(dtype)
    x = torch.randn(7, 24).to(dtype)
    before = model.fc0(x)
    fs.adapt(model, OFT(block_size=8, neumann=neumann), ["fc0"], train_modules=())
    assert torch.equal(model.fc0(x), before)


def test_counts():
    assert OFT(block_size=32).num_parameters(SiteShape("s", 768, 768)) == 11_904
    small_step = OFT(block_size=4).flops(SiteShape("s", 768, 768), 1) - OFT(block_size=4).flops(
        SiteShape("s", 768, 768), 0
    )
    assert small_step == 6_144
    assert OFT(block_size=4, neumann=5).flops(SiteShape("s", 8, 8), 0) == 2 * 3 * 2 * 64


def test_what_cannot_be_is_named():
    with pytest.raises(PlanError, match=r"block_size=32.*in=50.*'site'.*25"):
        OFT().plan([site(64, 50)])
    OFT().plan([site(50, 64)])
    with pytest.raises(InputError, match=r"neumann=1.*5"):
        OFT(neumann=1)
    with pytest.raises(InputError, match=r"block_size=1.*32"):
        OFT(block_size=1)


@pytest.mark.parametrize("form", [OFT(block_size=4), IA3(feedforward=("fc0:k",))], ids=str)
def test_a_slice_of_a_fused_layer_sees_the_turned_input(form):
    model, x = Layers((12, 8), bias=True).double(), torch.randn(4, 3, 8, dtype=torch.float64)
    layer = copy.deepcopy(model.fc0)
    adapter = fs.adapt(model, form, ["fc0:k"], train_modules=())
    (delta,) = adapter.deltas.values()
    for p in delta.double().parameters():
        nn.init.normal_(p)
    changed = layer.weight.detach().clone()
    changed[4:8] += delta.dense(changed[4:8])
    wanted = x @ changed.T + layer.bias
    torch.testing.assert_close(model.fc0(x), wanted)
    with fs.rows(model, ["default", None, None, "default"]):
        y = model.fc0(x)
    torch.testing.assert_close(y[[0, 3]], wanted[[0, 3]])
    torch.testing.assert_close(y[[1, 2]], layer(x)[[1, 2]])
