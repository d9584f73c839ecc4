"""LoKr against its definition, PEFT, its exact factors and its sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import adapted, moved, outputs_agree, peft, rank, site, update

from finespun.contract import SiteShape
from finespun.errors import InputError
from finespun.methods.structures import LoKr
from finespun.methods.structures.lokr import divide

FORMS = [
    LoKr(rank=2, alpha=6.0),
    LoKr(rank=2, decompose_both=True),
    LoKr(rank=8),
    LoKr(rank=2, factor=3),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(48, 30), (30, 48)])
def test_the_update_is_the_kronecker_product(form, shape):
    (delta,) = moved(form, site(*shape))
    wanted = form.scale * torch.kron(delta.factor("P"), delta.factor("Q")).detach()
    torch.testing.assert_close(update(delta), wanted)
    x = torch.randn(2, 3, shape[1]).double()
    torch.testing.assert_close(delta(x), x @ wanted.T)


@pytest.mark.parametrize("shape", [(96, 96), (64, 144), (144, 64)])
def test_the_factors_are_exact_and_of_rank_r_times_the_smaller_side(shape):
    (delta,) = moved(LoKr(rank=2), site(*shape))
    A, B = (t.detach() for t in delta.low_rank())
    dense = delta.delta(delta.base_weight()).detach()
    assert float((delta.scale * B @ A - dense).norm() / dense.norm()) <= 1e-12
    assert len(A) == rank(delta) == 2 * 8


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("r", [2, 8])
@pytest.mark.parametrize("factor", [-1, 5])
def test_outputs_are_pefts(both, r, factor):
    from peft import LoKrConfig

    config = LoKrConfig(r=r, alpha=12, decompose_both=both, decompose_factor=factor)
    layer = peft(config, (48, 30), bias=True).fc0
    ours, delta = adapted(LoKr(rank=r, alpha=12.0, decompose_both=both, factor=factor), layer)
    for name, numbers in delta.named_parameters():
        theirs = name.replace("P", "w1").replace("Q", "w2")
        theirs = theirs.translate({ord("a"): "b", ord("b"): "a"})
        numbers.data.copy_(getattr(layer, f"lokr_{theirs}")["default"])
    assert outputs_agree(ours, layer) <= 1e-5


@given(st.integers(1, 400), st.sampled_from([-1, 1, 4, 5, 16, 24]))
@settings(max_examples=60, deadline=None)
def test_sides_are_split_as_the_library_splits_them(n, factor):
    from peft.tuners.lokr.layer import factorization

    assert divide(n, factor) == factorization(n, factor)


@pytest.mark.parametrize(("size", "count", "row"), [(768, 1_088, 33_792), (4096, 5_120, 196_608)])
def test_counts(size, count, row):
    form, shape = LoKr(rank=8), SiteShape("s", size, size)
    assert form.num_parameters(shape) == count
    assert form.flops(shape, 1) == row
    most = form.rank * min(form.split(shape)[0])
    assert most == {768: 192, 4096: 512}[size]


def test_a_bad_factor_is_named():
    with pytest.raises(InputError, match=r"factor=0.*-1"):
        LoKr(factor=0)
