"""BOFT against its definition, PEFT's tensors, and its butterfly of several factors."""

import pytest
import torch
from peers import Layers, adapted, moved, outputs_agree, peft, rank, site, update

import finespun as fs
from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.methods.structures import BOFT
from finespun.methods.structures.boft import swap


def butterfly(n, block, level):
    """The order of P_i: position -> source."""
    return swap(torch.arange(n), 1 << level, 2, block // 2) if level else torch.arange(n)


def definition(delta):
    """diag(s)·W0·Qᵀ − W0 with every factor written out as a matrix."""
    w0 = delta.base_weight()
    n = w0.shape[1]
    Q = torch.eye(n).double()
    for i, X in enumerate(delta.X.detach()):
        S = (X - X.mT) / 2
        eye = torch.eye(S.shape[-1]).double()
        D = torch.block_diag(*((eye - S) @ torch.linalg.inv(eye + S)))
        P = torch.eye(n).double()[butterfly(n, S.shape[-1], i)]
        Q = P @ D @ P.T @ Q
    return delta.s.detach()[:, None] * (w0 @ Q.T) - w0, Q


@pytest.mark.parametrize(("block", "factors"), [(4, 1), (3, 1), (4, 2), (2, 4), (4, 3)])
def test_the_update_is_its_definition(block, factors):
    inner = 48 if block == 3 else 32
    (delta,) = moved(BOFT(block_size=block, factors=factors), site(12, inner))
    wanted, Q = definition(delta)
    torch.testing.assert_close(Q @ Q.T, torch.eye(inner).double())
    torch.testing.assert_close(update(delta), wanted)
    assert rank(delta) == 12


def test_m_factors_mix_blocks_of_inputs():
    (delta,) = moved(BOFT(block_size=2, factors=3), site(4, 16))
    _, Q = definition(delta)
    reached = (Q.abs() > 1e-12).sum(1)
    assert reached.tolist() == [8] * 16


def test_the_butterfly_is_pefts():
    from peft import BOFTConfig

    layer = peft(BOFTConfig(boft_block_size=4), (24, 32)).fc0
    for level in range(3):
        theirs = layer.block_butterfly_perm(32, 8 // 2**level, 2, 2)
        assert torch.equal(butterfly(32, 4, level), theirs)


@pytest.mark.filterwarnings("ignore")
def test_outputs_are_pefts():
    from peft import BOFTConfig

    layer = peft(BOFTConfig(boft_block_size=4), (24, 32), bias=True).fc0
    ours, delta = adapted(BOFT(block_size=4), layer)
    delta.X.data.copy_(layer.boft_R["default"])
    delta.s.data.copy_(layer.boft_s["default"].flatten())
    assert outputs_agree(ours, layer) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_several_factors_are_kept_without_a_gpu_extension():
    """PEFT 0.21.2 trains one factor, whatever was asked, where its CUDA extension is missing."""
    from peft import BOFTConfig

    layer = peft(BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2), (24, 32)).fc0
    assert layer.boft_R["default"].shape[0] == 1
    (delta,) = moved(BOFT(block_size=4, factors=2), site(24, 32))
    assert delta.X.shape == (2, 8, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_bit_for_bit(dtype):
    model = Layers((40, 24), bias=True).to(dtype)
    x = torch.randn(7, 24).to(dtype)
    before = model.fc0(x)
    fs.adapt(model, BOFT(block_size=4, factors=2), ["fc0"], train_modules=())
    assert torch.equal(model.fc0(x), before)


@pytest.mark.parametrize(("size", "count", "on_x"), [(768, 3_840, 6_144), (4096, 20_480, 32_768)])
def test_counts(size, count, on_x):
    form, shape = BOFT(), SiteShape("s", size, size)
    assert form.num_parameters(shape) == count
    assert form.flops(shape, 1) - form.flops(shape, 0) - 3 * size == on_x


def test_what_cannot_be_is_named():
    with pytest.raises(PlanError, match=r"block_size=4 with factors=2 mixes 8.*in=20.*'site'.*2"):
        BOFT(factors=2).plan([site(8, 20)])
    with pytest.raises(PlanError, match="fewer factors"):
        BOFT(factors=6).plan([site(8, 20)])
    with pytest.raises(InputError, match=r"block_size=3.*4"):
        BOFT(block_size=3, factors=2)
    with pytest.raises(InputError, match=r"factors=0.*1"):
        BOFT(factors=0)
