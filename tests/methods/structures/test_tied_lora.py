"""Tied-LoRA: what is shared, what is counted."""

import pytest
import torch
from peers import built, moved, rank, site

from finespun.contract import SiteShape
from finespun.errors import InputError
from finespun.methods.structures import TiedLoRA


@pytest.mark.parametrize(
    ("size", "own", "shared", "operations"),
    [(768, 776, 12_288, 25_352), (4096, 4_104, 65_536, 135_176)],
)
def test_counts_of_the_comparison_table(size, own, shared, operations):
    form, shapes = TiedLoRA(), [SiteShape(n, size, size) for n in "ab"]
    assert form.num_parameters(shapes[0]) == own
    assert form.flops(shapes[0]) == operations
    plan = form.plan([site(16, 8, "a"), site(16, 8, "b"), site(8, 16, "c")])
    assert form.num_shared_parameters(plan) == 8 * 24 * 2
    assert size * 2 * form.rank == shared


def test_layers_of_one_shape_share_and_gradients_add_up():
    deltas = moved(TiedLoRA(rank=4), site(20, 12, "a"), site(20, 12, "b"), site(12, 20, "c"))
    (A, _), (A2, _), (A3, _) = (d.shared() for d in deltas)
    assert A.data_ptr() == A2.data_ptr() != A3.data_ptr()
    x, owner = torch.randn(3, 12).double(), deltas[0].bank.A_20x12
    each = [torch.autograd.grad(d(x).square().sum(), owner)[0] for d in deltas[:2]]
    both = torch.autograd.grad(sum(d(x).square().sum() for d in deltas[:2]), owner)[0]
    torch.testing.assert_close(both, each[0] + each[1])
    assert [rank(d) for d in deltas] == [4, 4, 4]


def test_only_b_is_zero_at_first():
    (delta,), bank, _ = built(TiedLoRA(rank=4), site(20, 12))
    delta(torch.randn(3, 12)).sum().backward()
    assert torch.count_nonzero(bank.B_20x12.grad) == 80
    assert torch.count_nonzero(bank.A_20x12.grad) == torch.count_nonzero(delta.u.grad) == 0
    assert set(delta.state_dict()) == {"u", "v"}


def test_a_delta_without_its_bank_is_refused():
    form, where = TiedLoRA(rank=4), site(20, 12)
    with pytest.raises(InputError, match=r"'site'.*bank\(plan\).*Pairs.*None"):
        form.build(where, form.plan([where]))
