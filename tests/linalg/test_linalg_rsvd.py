"""The randomised SVD against the exact one."""

import pytest
import torch

from finespun.errors import InputError
from finespun.linalg import LowRank, randomized_svd, randomized_svd_of


def slow_spectrum(out=160, inner=128, ranks=64):
    """Singular values that fall by 100 over 64 ranks."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(out, ranks, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(inner, ranks, generator=generator, dtype=torch.float64))[0]
    σ = torch.logspace(0, -2, ranks, dtype=torch.float64)
    return U * σ @ V.mT, σ


def excess(M, σ, rank, **options):
    U, S, Vh = randomized_svd_of(M, rank, **options)
    return ((M - U * S @ Vh).norm() / σ[rank:].norm()).item()


def test_one_power_step_comes_within_two_percent_and_none_is_worse():
    M, σ = slow_spectrum()
    for seed in range(5):
        none, one, two = (excess(M, σ, 8, oversample=8, power=q, seed=seed) for q in (0, 1, 2))
        assert 1 <= two <= one <= 1.02
        assert none > one
        assert two <= 1.005


def test_singular_triplets_are_orthonormal_and_right():
    M, σ = slow_spectrum()
    U, S, Vh = randomized_svd_of(M, 6, power=4)
    assert (U.shape, S.shape, Vh.shape) == ((160, 6), (6,), (6, 128))
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(U.mT @ U, eye)
    torch.testing.assert_close(Vh @ Vh.mT, eye)
    torch.testing.assert_close(S, σ[:6], rtol=1e-4, atol=0)
    assert (M @ Vh.mT - U * S).norm() < 0.02


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (7, 7)])
def test_true_rank_below_the_probes_is_exact(shape):
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(3, shape[1], generator=generator, dtype=torch.float64)
    B = torch.randn(shape[0], 3, generator=generator, dtype=torch.float64)
    M = LowRank(A, B)
    for held in (M, M.dense()):
        svd = randomized_svd_of(held, 3)
        torch.testing.assert_close(LowRank.from_svd(svd, 3, torch.float64).dense(), M.dense())
        torch.testing.assert_close(svd.S, M.singular_values())


def test_implicit_products_are_counted_and_the_matrix_is_never_seen():
    M, _ = slow_spectrum()
    M = M.float()
    calls = []

    def apply(X):
        calls.append(("M", tuple(X.shape)))
        return M @ X

    def apply_t(Y):
        calls.append(("Mt", tuple(Y.shape)))
        return M.mT @ Y

    implicit = randomized_svd(apply, apply_t, (160, 128), 5, oversample=4, power=2)
    assert calls == [("M", (128, 9)), ("Mt", (160, 9))] * 3
    held = randomized_svd_of(M, 5, oversample=4, power=2)
    for one, other in zip(implicit, held):
        assert torch.equal(one, other)


def test_probes_follow_the_seed_alone():
    M, _ = slow_spectrum()
    state = torch.random.get_rng_state()
    first, same, other = (randomized_svd_of(M, 4, power=0, seed=s).S for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_half_precision_is_computed_in_single():
    M, _ = slow_spectrum()
    half = M.bfloat16()
    assert torch.equal(randomized_svd_of(half, 4).S, randomized_svd_of(half.float(), 4).S)


def test_ranks_that_cannot_be_are_refused():
    M = torch.zeros(6, 4)
    with pytest.raises(InputError, match=r"1\.\.4 for 6 x 4, got 5; try 4"):
        randomized_svd_of(M, 5)
    with pytest.raises(InputError, match="must not be negative"):
        randomized_svd_of(M, 2, power=-1)
