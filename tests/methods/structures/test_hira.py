"""HiRA against its definition, PEFT, and its rank."""

import torch
from peers import adapted, built, moved, outputs_agree, peft, rank, site, update

from finespun.contract import SiteShape, TensorSite
from finespun.methods.structures import HiRA


def test_the_update_is_the_hadamard_product():
    where = site(12, 10)
    (delta,) = moved(HiRA(rank=3, alpha=6.0), where)
    torch.testing.assert_close(update(delta), where.value * (2.0 * delta.B @ delta.A).detach())


def test_zeros_of_the_base_stay_and_rank_reaches_beyond_r():
    where = site(40, 30)
    where.value[::2, ::3] = 0
    (delta,) = moved(HiRA(rank=2), where)
    assert torch.count_nonzero(update(delta)[::2, ::3]) == 0
    assert rank(delta) == 30


def test_rank_is_at_most_r_times_the_base_s():
    g = torch.Generator().manual_seed(1)
    low = torch.randn(40, 3, generator=g).double() @ torch.randn(3, 30, generator=g).double()
    (delta,) = moved(HiRA(rank=4), TensorSite("s", low))
    assert rank(delta) == 12


def test_outputs_are_pefts():
    from peft import HiraConfig

    layer = peft(HiraConfig(r=4), (24, 16), bias=True).fc0
    ours, delta = adapted(HiRA(rank=4), layer)
    delta.A.data.copy_(layer.hira_A["default"])
    delta.B.data.copy_(layer.hira_B["default"])
    assert outputs_agree(ours, layer) <= 1e-5


def test_counts_and_usual_scale():
    assert HiRA(rank=32).num_parameters(SiteShape("q", 3072, 3072)) == 196_608
    assert HiRA(rank=8).num_parameters(SiteShape("s", 768, 768)) == 12_288
    (delta,), _, _ = built(HiRA(rank=4), site(24, 16))
    assert delta.scale == 1.0
