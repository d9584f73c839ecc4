"""LoRA-XS: its frozen directions, its gradient, its counts and what is saved."""

import pytest
import torch
from peers import built, moved, rank, site, update

from finespun.contract import SiteShape
from finespun.methods.structures import LoRAXS
from finespun.methods.structures.lora_xs import main_directions


@pytest.mark.parametrize(("size", "operations"), [(768, 49_664), (4096, 262_656)])
def test_counts_of_the_comparison_table(size, operations):
    shape = SiteShape("s", size, size)
    assert LoRAXS().num_parameters(shape) == 256
    assert LoRAXS().flops(shape) == operations


def test_numbers_of_mistral_7b():
    shapes = [SiteShape(str(i), o, n) for i, (o, n) in enumerate([(4096, 4096), (1024, 4096)])]
    assert [sum(112 * LoRAXS(rank=r).num_parameters(s) for s in shapes) for r in (96, 64, 32)] == [
        2_064_384,
        917_504,
        229_376,
    ]


def test_the_basis_is_the_best_of_its_rank():
    W = site(60, 40).value
    A, B = main_directions(W, 6)
    σ = torch.linalg.svdvals(W)
    assert float((W - B @ A).norm()) == pytest.approx(float(σ[6:].norm()), rel=1e-3)
    torch.testing.assert_close(B.T @ B, torch.eye(6).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(A @ A.T, torch.diag(A.norm(dim=1) ** 2), atol=1e-8, rtol=0)


def test_signs_do_not_hang_on_the_route():
    W = site(60, 40).value
    (A, B), (A2, B2) = main_directions(W, 4), main_directions(-W, 4)
    assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(B, B2, atol=1e-12, rtol=0)
    torch.testing.assert_close(A, -A2, atol=1e-12, rtol=0)


def test_the_gradient_of_the_core_is_projected():
    """g_R = s Bᵀ G Aᵀ; with orthonormal A and B and s = 1, B g_R A is the projection of G."""
    (delta,) = moved(LoRAXS(rank=5, alpha=15.0), site(30, 20))
    x, g = torch.randn(7, 20).double(), torch.randn(7, 30).double()
    G = g.T @ x
    (delta(x) * g).sum().backward()
    A, B = delta.basis()
    torch.testing.assert_close(delta.R.grad, 3 * B.T @ G @ A.T)
    delta.set_basis(torch.linalg.qr(A.T).Q.T, B)
    delta.scale, delta.R.grad = 1.0, None
    (delta(x) * g).sum().backward()
    A, B = delta.basis()
    wanted = B @ torch.linalg.pinv(B) @ G @ torch.linalg.pinv(A) @ A
    torch.testing.assert_close(B @ delta.R.grad @ A, wanted, rtol=1e-5, atol=1e-5)


def test_the_rank_is_r_and_clients_average_exactly():
    deltas = [moved(LoRAXS(rank=16), site(96, 96))[0] for _ in range(3)]
    assert rank(deltas[0]) == 16
    for i, delta in enumerate(deltas):
        delta.R.data.mul_(i + 1.0).add_(i)
    mean = sum(update(d) for d in deltas) / 3
    deltas[0].R.data = sum(d.R.data for d in deltas) / 3
    torch.testing.assert_close(update(deltas[0]), mean, rtol=1e-10, atol=1e-10)


def test_only_the_core_is_saved_unless_the_basis_was_given():
    (derived,), _, _ = built(LoRAXS(rank=3), site(8, 6))
    (given,), _, _ = built(LoRAXS(rank=3, start="gradient"), site(8, 6))
    assert set(derived.state_dict()) == {"R"}
    assert set(given.state_dict()) == {"R", "A", "B"}
    assert {n for n, _ in given.named_parameters()} == {"R"}
    assert torch.count_nonzero(given.basis()[0]) == 0


def test_noise_is_the_papers_start():
    form = LoRAXS(rank=16, noise=1e-5)
    (delta,), _, _ = built(form, site(40, 30))
    assert not form.starts_at_zero
    assert float(delta.R.detach().std()) == pytest.approx(1e-5, rel=0.15)
