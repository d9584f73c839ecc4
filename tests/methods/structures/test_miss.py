"""MiSS against its definition and PEFT."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import adapted, moved, outputs_agree, peft, rank, site, update

from finespun.contract import SiteShape
from finespun.methods.structures import MiSS


@given(st.integers(1, 9), st.integers(9, 31))
@settings(max_examples=20, deadline=None)
def test_column_i_of_the_update_is_row_i_mod_r(r, inner):
    (delta,) = moved(MiSS(rank=r), site(12, inner))
    wanted = delta.D.detach()[torch.arange(inner) % r].T
    torch.testing.assert_close(update(delta), wanted)
    x = torch.randn(2, 3, inner).double()
    torch.testing.assert_close(delta(x), x @ wanted.T)


def test_rank_and_factors():
    (delta,) = moved(MiSS(rank=5), site(24, 21))
    assert rank(delta) == 5
    assert delta.low_rank()[0].sum(0).tolist() == [1.0] * 21


@pytest.mark.parametrize("inner", [16, 18])
def test_outputs_are_pefts(inner):
    from peft import MissConfig

    layer = peft(MissConfig(r=4), (24, inner), bias=True).fc0
    ours, delta = adapted(MiSS(rank=4), layer)
    delta.D.data.copy_(layer.miss_block["default"])
    assert outputs_agree(ours, layer) <= 1e-5


def test_counts():
    assert MiSS().num_parameters(SiteShape("s", 768, 768)) == 49_152
    assert MiSS().flops(SiteShape("s", 768, 512), 2) == 2 * (512 + 2 * 49_152)
    assert MiSS().scale == 1.0
    assert MiSS(rank=4, alpha=8.0).scale == 2.0
