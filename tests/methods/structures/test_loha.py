"""LoHa against its definition, PEFT, and its exact factors."""

import pytest
import torch
from peers import adapted, moved, outputs_agree, peft, rank, site, update

from finespun.contract import SiteShape
from finespun.methods.structures import LoHa


@pytest.mark.parametrize("r", [2, 3, 7])
def test_the_update_is_the_hadamard_product_of_two_products(r):
    (delta,) = moved(LoHa(rank=r, alpha=3.0 * r), site(24, 20))
    wanted = 3.0 * (delta.B1 @ delta.A1) * (delta.B2 @ delta.A2)
    torch.testing.assert_close(update(delta), wanted.detach(), rtol=1e-12, atol=1e-12)
    assert (delta.low_rank() is None) == (r == 7)


def test_the_factors_are_exact_and_of_rank_r_squared():
    (delta,) = moved(LoHa(rank=4), site(96, 96))
    A, B = (t.detach() for t in delta.low_rank())
    dense = delta.delta(delta.base_weight()).detach()
    assert A.shape == (16, 96)
    assert float((delta.scale * B @ A - dense).norm() / dense.norm()) <= 1e-12
    assert rank(delta) == 16


def test_the_layer_is_linear_in_its_input():
    """The unified study's code multiplies two layer outputs: twice x gave four times y."""
    (delta,) = moved(LoHa(rank=2), site(24, 20))
    x = torch.randn(3, 20).double()
    torch.testing.assert_close(delta(2 * x), 2 * delta(x))


@pytest.mark.parametrize("r", [2, 8])
def test_outputs_are_pefts(r):
    from peft import LoHaConfig

    layer = peft(LoHaConfig(r=r, alpha=12), (24, 16), bias=True).fc0
    ours, delta = adapted(LoHa(rank=r, alpha=12.0), layer)
    for name, theirs in (("B1", "w1_a"), ("A1", "w1_b"), ("B2", "w2_a"), ("A2", "w2_b")):
        delta.get_parameter(name).data.copy_(getattr(layer, f"hada_{theirs}")["default"])
    assert outputs_agree(ours, layer) <= 1e-5


@pytest.mark.parametrize(
    ("size", "count", "row"), [(768, 24_576, 196_608), (4096, 131_072, 1_048_576)]
)
def test_counts(size, count, row):
    form, shape = LoHa(rank=8), SiteShape("s", size, size)
    assert form.num_parameters(shape) == count
    assert form.flops(shape, 1) - form.flops(shape, 0) == row


def test_counts_of_the_dense_form():
    form, shape = LoHa(rank=32), SiteShape("s", 768, 768)
    assert form.flops(shape, 1) - form.flops(shape, 0) == 1_179_648
    assert form.flops(shape, 0) == (4 * 32 + 1) * 768**2
