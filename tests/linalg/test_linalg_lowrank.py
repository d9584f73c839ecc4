"""LowRank equals the dense matrix it stands for, and squeezes to the Eckart-Young optimum."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from finespun.errors import InputError
from finespun.linalg import LowRank

small = st.integers(1, 6)
sizes = st.tuples(small, small, small)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(out, r, inner, seed=0, dtype=torch.float64):
    A, B = draw(r, inner, seed=seed, dtype=dtype), draw(out, r, seed=seed + 1, dtype=dtype)
    return LowRank(A, B)


def with_spectrum(values, out=40, inner=30, dtype=torch.float64):
    r = len(values)
    U = torch.linalg.qr(draw(out, r, seed=3))[0]
    V = torch.linalg.qr(draw(inner, r, seed=4))[0]
    mix = draw(r, r, seed=5) + 3 * torch.eye(r, dtype=torch.float64)
    B = U * torch.tensor(values, dtype=torch.float64) @ mix
    return LowRank(torch.linalg.solve(mix, V.mT).to(dtype), B.to(dtype))


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@given(sizes, small)
@settings(max_examples=50, deadline=None)
def test_arithmetic_is_that_of_the_dense_matrix(shape, r2):
    out, r, inner = shape
    M, N = make(out, r, inner), make(out, r2, inner, seed=9)
    D, E = M.dense(), N.dense()
    x, y = draw(inner, seed=2), draw(out, seed=3)
    assert M.shape == tuple(D.shape)
    assert M.rank == r
    close = torch.testing.assert_close
    close(M @ x, D @ x)
    close(y @ M, y @ D)
    close(M @ draw(2, inner, 3), D @ draw(2, inner, 3))
    close(draw(2, 3, out) @ M, draw(2, 3, out) @ D)
    close(M.T.dense(), D.T)
    close((M + N).dense(), D + E)
    close((M - N).dense(), D - E)
    close((-M).dense(), -D)
    close((M * 2.5).dense(), 2.5 * D)
    close((2.5 * M).dense(), 2.5 * D)
    close((torch.tensor(0.5) * M).dense(), 0.5 * D)
    close(M.norm(), D.norm())
    close(M.inner(N), (D * E).sum())
    assert (M + N).rank == r + r2


@given(sizes)
@settings(max_examples=50, deadline=None)
def test_svd_is_that_of_the_dense_matrix(shape):
    out, r, inner = shape
    M = make(*shape)
    U, S, Vh = M.svd()
    k = min(shape)
    assert (U.shape, S.shape, Vh.shape) == ((out, k), (k,), (k, inner))
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(U * S @ Vh, M.dense())
    torch.testing.assert_close(U.mT @ U, eye)
    torch.testing.assert_close(Vh @ Vh.mT, eye)
    full = torch.linalg.svdvals(M.dense())
    torch.testing.assert_close(S, full[:k])
    torch.testing.assert_close(M.singular_values(), S)
    assert full[min(r, len(full)) :].sum() <= 1e-12 * full[0]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_full_rank_squeeze_keeps_the_product_and_the_scale(dtype, bound):
    plain = make(48, 8, 64, dtype=dtype)
    old_scale, new_scale = 2.0, 0.5
    squeezed = (plain * (old_scale / new_scale)).squeeze(8)
    exact = old_scale * (plain.B.double() @ plain.A.double())
    got = new_scale * (squeezed.B.double() @ squeezed.A.double())
    assert relative(got, exact) <= bound
    assert squeezed.A.dtype == dtype


@given(st.integers(2, 9), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_squeeze_reaches_the_optimum_and_predicts_it(r, seed):
    M = make(12, r, 10, seed=seed)
    σ = torch.linalg.svdvals(M.dense())
    for rank in range(1, r):
        gap = (M.dense() - M.squeeze(rank).dense()).norm().item()
        assert gap == pytest.approx(σ[rank:].norm().item(), rel=1e-9)
        assert M.error(rank) == pytest.approx(gap / M.norm().item(), rel=1e-9)
        torch.testing.assert_close(
            M.squeeze(rank).dense(), LowRank.from_dense(M.dense(), rank).dense()
        )
    assert M.error(0) == 1
    assert M.error(r) <= 1e-12


def test_squeezed_factors_are_balanced_sorted_and_nested():
    M = make(200, 64, 100)
    direct, steps = M.squeeze(4), M.squeeze(16).squeeze(4)
    assert relative(steps.dense(), direct.dense()) <= 1e-6
    sixteen = M.squeeze(16)
    gram = sixteen.A @ sixteen.A.mT
    torch.testing.assert_close(sixteen.B.mT @ sixteen.B, gram)
    torch.testing.assert_close(gram, torch.diag(M.singular_values()[:16]))
    assert (gram.diagonal().diff() <= 0).all()
    assert torch.equal(LowRank(sixteen.A[:4], sixteen.B[:, :4]).dense(), direct.dense())


def test_energy_picks_the_smallest_rank_that_keeps_it():
    M = with_spectrum([4.0, 2.0, 1.0, 0.5, 0.25])
    total = sum(s * s for s in (4, 2, 1, 0.5, 0.25))
    assert M.squeeze(energy=16 / total - 1e-9).rank == 1
    assert M.squeeze(energy=16 / total + 1e-9).rank == 2
    assert M.squeeze(energy=0.95).rank == 3
    assert M.squeeze(energy=1.0).rank == 5
    assert M.squeeze(rank=2, energy=0.95).rank == 2
    assert M.squeeze(rank=4, energy=0.95).rank == 3
    assert M.squeeze().rank == 5
    assert LowRank.from_dense(M.dense(), energy=0.95).rank == 3
    assert LowRank.from_dense(M.dense()).rank == 30
    zero = M * 0.0
    assert zero.squeeze(energy=0.95).rank == 1
    assert zero.error(1) == zero.norm() == 0


def test_more_ranks_than_dimensions_come_as_zeros():
    M = make(3, 5, 9)
    squeezed = M.squeeze(5)
    assert squeezed.A.shape == (5, 9)
    torch.testing.assert_close(squeezed.dense(), M.dense())
    assert squeezed.A[3:].abs().max() == squeezed.B[:, 3:].abs().max() == 0


def test_norm_of_a_small_difference_is_accurate():
    M = make(50, 4, 40)
    near = M * (1 + 1e-9)
    assert (M - near).norm().item() == pytest.approx(1e-9 * M.norm().item(), rel=1e-5)


def test_half_precision_is_computed_in_single_and_rounded_once():
    M = with_spectrum([4.0, 2.0, 1.0, 0.5], dtype=torch.bfloat16)
    squeezed = M.squeeze(4)
    single = LowRank(M.A.float(), M.B.float())
    assert squeezed.A.dtype == torch.bfloat16
    assert torch.equal(squeezed.B, single.squeeze(4).B.bfloat16())
    rounded = squeezed.B.float() @ squeezed.A.float()
    assert relative(rounded, single.dense()) < 4e-3
    assert M.norm().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_directions_revive_without_moving_the_product(dtype):
    M = with_spectrum([3.0, 2.0, 1.0], dtype=dtype)
    mix = draw(3, 12, seed=8, dtype=dtype)
    wide = LowRank(torch.linalg.pinv(mix) @ M.A, M.B @ mix)
    squeezed = wide.squeeze(8)
    assert 0 < squeezed.B[:, 3:].norm() < 1e-3 * squeezed.B.norm()
    alive = squeezed.revive(torch.Generator().manual_seed(0))
    assert relative(alive.dense(), M.dense()) <= 1e-6
    assert alive.B[:, 3:].abs().max() == 0
    assert torch.equal(alive.A[:3], squeezed.A[:3])
    assert torch.equal(alive.B[:, :3], squeezed.B[:, :3])
    lengths = alive.A.norm(dim=1)
    torch.testing.assert_close(lengths[3:], lengths[:3].mean().expand(5))
    B = alive.B.clone().requires_grad_()
    x = draw(30, seed=6, dtype=dtype)
    (B @ (alive.A @ x) - draw(40, seed=7, dtype=dtype)).square().sum().backward()
    assert (B.grad[:, 3:].norm(dim=0) > 1e-3).all()
    again = squeezed.revive(torch.Generator().manual_seed(0))
    assert torch.equal(alive.A, again.A)


def test_reviving_nothing_and_everything():
    M = make(6, 3, 5)
    same = M.revive(torch.Generator().manual_seed(0))
    assert torch.equal(same.A, M.A)
    assert torch.equal(same.B, M.B)
    reborn = LowRank(M.A, 0 * M.B).revive(torch.Generator().manual_seed(0))
    assert reborn.B.abs().max() == 0
    assert reborn.A.norm(dim=1).tolist() == pytest.approx([1 / math.sqrt(3)] * 3)
    empty = LowRank(M.A[:0], M.B[:, :0])
    assert empty.revive().rank == 0
    assert empty.norm() == 0


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


def test_only_dense_builds_the_whole_matrix():
    M, N = make(300, 4, 200), make(300, 2, 200, seed=9)
    with Largest() as seen:
        total = (M + N - 0.5 * M).T
        total.squeeze(energy=0.9).revive(torch.Generator().manual_seed(0))
        total.norm(), M.inner(N), M.svd(), M.error(2), M.singular_values()
        M @ draw(200), draw(300) @ M
    assert 0 < seen.numbers <= 10 * 300
    with Largest() as seen:
        M.dense()
    assert seen.numbers == 300 * 200


def test_gradients_flow_through_products_norm_and_inner():
    def everything(A, B):
        M = LowRank(A, B)
        return M @ draw(5), draw(6) @ M, M.norm(), M.inner(make(6, 2, 5)), (M - M * 0.5).dense()

    assert torch.autograd.gradcheck(
        everything, (draw(3, 5).requires_grad_(), draw(6, 3, seed=1).requires_grad_())
    )


def test_what_cannot_work_is_refused():
    M = make(6, 3, 5)
    with pytest.raises(InputError, match="with one r"):
        LowRank(M.A, M.B[:, :2])
    with pytest.raises(InputError, match=r"rank must be 1\.\.3 here, got 4; nearest: 3"):
        M.squeeze(4)
    with pytest.raises(InputError, match="got 0"):
        M.squeeze(0)
    with pytest.raises(InputError, match=r"such as 0\.95, got 95"):
        M.squeeze(energy=95)
    with pytest.raises(InputError, match="at least 0"):
        M.error(-1)
    with pytest.raises(InputError, match="shapes differ"):
        M + M.T
    with pytest.raises(InputError, match="shapes differ"):
        M.inner(M.T)
    with pytest.raises(InputError, match="expected a matrix"):
        LowRank.from_dense(torch.zeros(3))
