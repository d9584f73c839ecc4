"""Choice of Kronecker shapes, nearest Kronecker sums and their conditioning."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finespun.errors import InputError
from finespun.kernels.kron import kron_apply, kron_rearrange, kron_sum
from finespun.linalg import (
    choose_factors,
    choose_factors3,
    condition,
    nearest_kronecker_sum,
    rebalance,
)

small = st.integers(1, 5)
sizes = st.tuples(small, small, small, small, small)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("n", "p1", "p2"),
    [
        (768, 24, 32),
        (1024, 32, 32),
        (1280, 32, 40),
        (2048, 32, 64),
        (3072, 48, 64),
        (4096, 64, 64),
        (5120, 64, 80),
        (8192, 64, 128),
        (11008, 86, 128),
        (13824, 108, 128),
        (14336, 112, 128),
        (18944, 128, 148),
        (28672, 128, 224),
    ],
)
def test_usual_widths_split_evenly_and_exactly(n, p1, p2):
    shape = choose_factors(4, n)
    assert (shape.r1, shape.r2, shape.p1, shape.p2, shape.pad) == (2, 2, p1, p2, 0)
    assert choose_factors(1, n).numbers == p1 + p2


def test_awkward_widths_are_padded():
    prime = choose_factors(4, 1009)
    assert (prime.p1, prime.p2, prime.pad, prime.numbers) == (29, 35, 6, 128)
    words = choose_factors(4, 50257)
    assert (words.r1, words.r2, words.p1, words.p2) == (1, 4, 441, 114)
    assert (words.numbers, words.pad) == (897, 17)


@pytest.mark.parametrize("r", [2, 3, 5, 7, 13])
def test_prime_rank_splits_as_one_by_r(r):
    shape = choose_factors(r, 768)
    assert (shape.r1, shape.r2) == (1, r)


def test_parameter_counts_of_the_paper_configuration():
    def layer(r, s, n_in, n_out):
        down = choose_factors(r, n_in)
        up = choose_factors(r, n_out, rank_split=(down.r1, down.r2))
        return s * (down.numbers + up.numbers)

    assert layer(4, 16, 768, 768) == 3_584
    assert layer(4, 16, 4096, 4096) == 8_192
    assert layer(4, 16, 4096, 11008) == 10_944


def test_unequal_split_on_request_costs_no_numbers():
    equal, unequal = choose_factors(4, 768), choose_factors(4, 768, prefer_unequal=True)
    assert (unequal.r1, unequal.r2) == (1, 4)
    assert unequal.numbers == equal.numbers == 112


@given(st.integers(1, 24), st.integers(1, 3000), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_choice_covers_the_dimension_within_its_rules(r, n, unequal):
    shape = choose_factors(r, n, prefer_unequal=unequal)
    assert shape.r1 * shape.r2 == r
    assert shape.p1 * shape.p2 == n + shape.pad
    assert 0 <= shape.pad <= max(1, int(0.02 * n))
    bound = 2 * math.sqrt(r * n)
    assert shape.numbers >= bound * (1 - 1e-12)
    exact = min(
        a * p + (r // a) * (n // p)
        for a in range(1, r + 1)
        for p in range(1, n + 1)
        if r % a == 0 and n % p == 0
    )
    assert shape.numbers <= exact
    if exact <= 1.1 * bound:
        assert (shape.numbers, shape.pad) == (exact, 0)
    elif shape.pad:
        assert shape.numbers < exact


@pytest.mark.parametrize("r", [1, 4, 6, 7])
def test_choice_is_the_best_that_its_rules_allow(r):
    ranks = [a for a in range(1, r + 1) if r % a == 0]
    for n in range(1, 90):
        allowed = max(1, int(0.02 * n))
        padded = [(a, p, -(-n // p)) for a in ranks for p in range(1, n + 2)]
        best = min(a * p + r // a * q for a, p, q in padded if p * q - n <= allowed)
        exact = min(a * p + r // a * (n // p) for a in ranks for p in range(1, n + 1) if n % p == 0)
        good_enough = exact <= 1.1 * 2 * math.sqrt(r * n)
        assert choose_factors(r, n).numbers == (exact if good_enough else best), n


def test_rank_split_is_kept_or_refused():
    shape = choose_factors(8, 768, rank_split=(1, 8))
    assert (shape.r1, shape.r2, shape.pad) == (1, 8, 0)
    with pytest.raises(InputError, match=r"does not multiply to r=8; \(2, 4\) does"):
        choose_factors(8, 768, rank_split=(2, 3))
    with pytest.raises(InputError, match="at least 1"):
        choose_factors(0, 768)
    with pytest.raises(InputError, match="at least 1"):
        choose_factors3(4, 0)


def test_three_factors():
    cube = choose_factors3(8, 4096)
    assert (cube.r1, cube.r2, cube.r3, cube.p1, cube.p2, cube.p3) == (2, 2, 2, 16, 16, 16)
    assert cube.numbers == 96
    for r, n in [(4, 768), (8, 50257), (6, 1009), (1, 7), (12, 28672)]:
        shape = choose_factors3(r, n)
        assert shape.r1 * shape.r2 * shape.r3 == r
        assert shape.p1 * shape.p2 * shape.p3 == n + shape.pad
        assert 0 <= shape.pad <= max(1, int(0.02 * n))
        assert shape.numbers >= 3 * math.cbrt(r * n) * (1 - 1e-12)
        assert shape.numbers == sum(a * p for a, p in zip(shape.ranks, shape.sizes))
        assert choose_factors3(r, n, rank_split=shape.ranks) == shape
    assert choose_factors3(8, 4096, rank_split=(4, 1, 2)).ranks == (4, 1, 2)
    with pytest.raises(InputError, match=r"does not multiply to r=8; \(2, 2, 2\) does"):
        choose_factors3(8, 4096, rank_split=(2, 2, 3))


@pytest.mark.parametrize("r", [1, 4, 6])
def test_three_factors_are_the_best_that_their_rules_allow(r):
    spans = range(1, r + 1)
    ranks = [(a, b, r // a // b) for a in spans for b in spans if r % (a * b) == 0]
    for n in range(1, 40):
        sizes = [(p, q, -(-n // (p * q))) for p in range(1, n + 1) for q in range(1, n + 1)]
        costs = [
            (sum(a * p for a, p in zip(rank, size)), math.prod(size) - n)
            for rank in ranks
            for size in sizes
        ]
        exact = min(cost for cost, pad in costs if pad == 0)
        padded = min(cost for cost, pad in costs if pad <= max(1, int(0.02 * n)))
        good_enough = exact <= 1.1 * 3 * math.cbrt(r * n)
        assert choose_factors3(r, n).numbers == (exact if good_enough else padded), n


def test_prime_dimension_with_padding_keeps_every_path_equal():
    shape = choose_factors(4, 1009)
    P, Q = draw(3, shape.r1, shape.p1), draw(3, shape.r2, shape.p2, seed=1)
    A = kron_sum(P, Q)[:, :1009]
    assert A.shape == (4, 1009)
    x = draw(5, 1009, seed=2)
    padded = torch.nn.functional.pad(x, (0, shape.pad))
    for order in ("first", "second"):
        assert relative(kron_apply(P, Q, padded, order), x @ A.T) <= 1e-12


@given(sizes, st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_projection_error_is_exactly_the_discarded_energy(shape, seed):
    S, a, b, i, j = shape
    M = draw(a * b, i * j, seed=seed)
    P, Q, error = nearest_kronecker_sum(M, S, a, b, i, j)
    assert (P.shape, Q.shape) == ((S, a, i), (S, b, j))
    σ = torch.linalg.svdvals(kron_rearrange(M, a, b, i, j))
    gap = (M - kron_sum(P, Q)).norm()
    if min(a * i, b * j) > S:
        discarded = σ[S:].square().sum()
        assert (gap.square() / discarded).item() == pytest.approx(1, abs=1e-10)
        assert error.item() == pytest.approx(discarded.sqrt().item(), rel=1e-12)
    else:
        assert error == 0
        assert gap / M.norm() < 1e-12
    torch.testing.assert_close(P.flatten(1).norm(dim=1), Q.flatten(1).norm(dim=1))
    assert condition(P, Q).item() == pytest.approx(1, abs=1e-10)


def test_projection_of_stacked_layers_equals_one_by_one():
    M = draw(3, 8, 15)
    P, Q, error = nearest_kronecker_sum(M, 3, 2, 4, 5, 3)
    assert error.shape == (3,)
    for layer in range(3):
        p, q, e = nearest_kronecker_sum(M[layer], 3, 2, 4, 5, 3)
        torch.testing.assert_close(kron_sum(P, Q)[layer], kron_sum(p, q))
        assert error[layer].item() == pytest.approx(e.item())
    with pytest.raises(InputError, match="at least 1 term"):
        nearest_kronecker_sum(M, 0, 2, 4, 5, 3)


def test_no_other_sum_is_nearer():
    M = draw(6, 20)
    P, Q, error = nearest_kronecker_sum(M, 2, 2, 3, 4, 5)
    for seed in range(20):
        dP, dQ = 1e-3 * draw(*P.shape, seed=seed), 1e-3 * draw(*Q.shape, seed=seed + 50)
        assert (M - kron_sum(P + dP, Q + dQ)).norm() > error


@given(sizes)
@settings(max_examples=50, deadline=None)
def test_rebalancing_keeps_the_sum_and_cures_the_condition(shape):
    S, a, b, i, j = shape
    P, Q = draw(S, a, i), draw(S, b, j, seed=1)
    assert condition(P, Q) >= 1 / math.sqrt(S) - 1e-12
    P2, Q2 = rebalance(P, Q)
    assert (P2.shape, Q2.shape) == (P.shape, Q.shape)
    assert relative(kron_sum(P2, Q2), kron_sum(P, Q)) <= 1e-12
    assert condition(P2, Q2).item() == pytest.approx(1, abs=1e-6)


def ill_conditioned(κ):
    """Eight paper-sized terms, and nearly their negatives."""
    P, Q = draw(8, 2, 32), draw(8, 2, 24, seed=1)
    tiny = math.sqrt(2) / κ
    return torch.cat([P, -P]), torch.cat([Q, Q + tiny * draw(8, 2, 24, seed=2)])


def test_rounding_to_bf16_costs_condition_times_the_unit_and_rebalancing_pays_it():
    P, Q = ill_conditioned(100)
    κ = condition(P, Q).item()
    assert 80 < κ < 125
    A = kron_sum(P, Q)

    def rounded_error(P, Q):
        return relative(kron_sum(P.bfloat16().double(), Q.bfloat16().double()), A)

    assert 0.15 < rounded_error(P, Q) < 0.35
    assert rounded_error(*rebalance(P, Q)) < 0.005


def test_condition_at_the_edges():
    P, Q = draw(1, 2, 3), draw(1, 3, 2, seed=1)
    assert condition(P, Q).item() == pytest.approx(1)
    assert condition(P, 0 * Q) == 1
    assert condition(torch.cat([P, -P]), torch.cat([Q, Q])) == math.inf
    stacked = condition(torch.stack([P, P]), torch.stack([Q, 0 * Q]))
    assert stacked.tolist() == pytest.approx([1, 1])


def test_half_precision_is_computed_in_single_and_rounded_once():
    M = draw(8, 15).bfloat16()
    P, Q, _ = nearest_kronecker_sum(M, 6, 2, 4, 5, 3)
    P32, Q32, _ = nearest_kronecker_sum(M.float(), 6, 2, 4, 5, 3)
    assert P.dtype == Q.dtype == torch.bfloat16
    assert torch.equal(P, P32.bfloat16())
    assert torch.equal(Q, Q32.bfloat16())
    assert [t.dtype for t in rebalance(P, Q)] == [torch.bfloat16] * 2
