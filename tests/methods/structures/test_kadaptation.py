"""KAdaptation: its sum of Kronecker products, its rank and its counts."""

import pytest
import torch
from peers import built, moved, rank, site, update

from finespun.contract import SiteShape
from finespun.errors import PlanError
from finespun.methods.structures import KAdaptation


@pytest.mark.parametrize(
    ("size", "count", "operations"), [(768, 1_536, 12_416), (4096, 8_192, 65_664)]
)
def test_counts_of_the_comparison_table(size, count, operations):
    form, shape = KAdaptation(), SiteShape("s", size, size)
    assert form.num_parameters(shape) == count
    assert form.num_shared_parameters(form.plan([site(8, 8)])) == 64
    assert form.flops(shape) == operations


@pytest.mark.parametrize("r", [1, 2])
def test_the_update_is_a_sum_of_kronecker_products(r):
    (delta,) = moved(KAdaptation(rank=r, terms=3, alpha=5.0), site(24, 18))
    W = sum(torch.kron(P, U @ V) for P, U, V in zip(delta.P, delta.U, delta.V)) * 5 / r
    A, B = delta.low_rank()
    torch.testing.assert_close(delta.scale * B @ A, W, rtol=1e-12, atol=1e-12)
    assert A.shape == (9 * r, 18)
    x = torch.randn(2, 5, 18).double()
    torch.testing.assert_close(delta(x), x @ W.T, rtol=1e-12, atol=1e-12)


def test_the_rank_is_n_squared_times_r():
    (delta,) = moved(KAdaptation(), site(96, 96))
    assert rank(delta) == 16


def test_layers_of_all_shapes_share_the_small_matrices():
    deltas, bank, _ = built(KAdaptation(), site(24, 16, "a"), site(8, 32, "b"))
    assert deltas[0].P.data_ptr() == deltas[1].P.data_ptr()
    assert {n: tuple(p.shape) for n, p in bank.named_parameters()} == {"P": (4, 4, 4)}
    assert torch.count_nonzero(update(deltas[0])) == 0
    deltas[0](torch.randn(3, 16)).sum().backward()
    assert torch.count_nonzero(deltas[0].U.grad) == 24
    assert torch.count_nonzero(bank.P.grad) == torch.count_nonzero(deltas[0].V.grad) == 0


def test_what_does_not_divide_is_named():
    with pytest.raises(PlanError, match=r"terms=4.*in=18.*3"):
        KAdaptation().plan([site(24, 18)])
