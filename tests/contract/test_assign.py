"""Delta.assign: becoming the nearest of another update, in a metric of the layer's inputs."""

import pytest
import torch
from suite import INNER, WIDTH, draw, every_structure, relative, stir

import finespun as fs
from finespun.contract import TensorSite
from finespun.contract.fitting import fit, square_root
from finespun.linalg import LowRank

FITTED = ("lora", "lsr", "delta", "straight", "entries", "columns", "rows", "block")


def update_of(delta):
    pair = delta.factors()
    W = delta.scale * pair[1] @ pair[0] if pair else delta.dense(delta.base_weight())
    return W.detach()


def metric():
    half = draw(WIDTH, WIDTH, seed=9, dtype=torch.float64)
    return half @ half.T / WIDTH + 0.1 * torch.eye(WIDTH, dtype=torch.float64)


@every_structure(lambda case: case.kind in FITTED)
def test_its_own_update_is_found_again(case):
    other = case.delta()
    moving = [*other.trained_parameters(), *(other.bank.parameters() if other.bank else ())]
    if not moving:
        return
    stir([p for p in moving if p.requires_grad])
    wanted, delta = update_of(other), case.delta()
    error = delta.assign(wanted if other.factors() is None else other.as_low_rank())
    assert error == pytest.approx(relative(update_of(delta), wanted), abs=1e-5)
    assert error <= 0.02


@pytest.mark.slow
@every_structure(lambda case: case.kind in FITTED)
def test_it_is_nearer_than_nothing_in_the_metric_asked_for(case):
    delta, C = case.delta(), metric()
    rows = WIDTH if case.block else INNER
    wanted, root = draw(rows, WIDTH, seed=3), square_root(metric())
    told = delta.assign(wanted, C)
    found = relative(update_of(delta).double() @ root, wanted.double() @ root)
    assert told == pytest.approx(found, abs=1e-4)
    assert told <= 1 + 1e-6
    again = case.delta()
    assert again.assign(wanted, C) == told
    assert torch.equal(update_of(again), update_of(delta))


@pytest.mark.parametrize("weighted", [True, False])
def test_lora_is_the_truncated_singular_value_decomposition(weighted):
    form, site = fs.LoRA(rank=3, alpha=5.0), TensorSite("s", draw(INNER, WIDTH))
    delta = form.build(site, form.plan([site]))
    wanted, C = draw(INNER, WIDTH, seed=4), metric() if weighted else None
    root = torch.eye(WIDTH, dtype=torch.float64) if C is None else square_root(C)
    U, S, V = torch.linalg.svd(wanted.double() @ root, full_matrices=False)
    best = (U[:, :3] * S[:3]) @ V[:3] @ torch.linalg.inv(root)
    error = delta.assign(wanted, C)
    assert relative(update_of(delta), best) <= 1e-5
    assert error == pytest.approx(float(S[3:].norm() / S.norm()), rel=1e-5)
    generic = form.build(site, form.plan([site]))
    assert fit(generic, wanted, C) == pytest.approx(error, rel=1e-2)


def test_lora_takes_over_what_fits_bit_for_bit():
    form, site = fs.LoRA(rank=4), TensorSite("s", draw(INNER, WIDTH))
    delta = form.build(site, form.plan([site]))
    exact = LowRank(draw(3, WIDTH, seed=1), draw(INNER, 3, seed=2))
    assert delta.assign(exact * 2.0) == pytest.approx(0, abs=1e-6)
    assert relative(update_of(delta), 2.0 * exact.dense()) <= 1e-6
    assert torch.count_nonzero(delta.A[3]) == torch.count_nonzero(delta.B[:, 3]) == 0


def test_lsr_is_its_nearest_kronecker_sums():
    form, site = fs.LSR(rank=4, separation_rank=3), TensorSite("s", draw(INNER, WIDTH))
    one, other = (form.build(site, form.plan([site])) for _ in range(2))
    wanted = LowRank(draw(4, WIDTH, seed=1), draw(INNER, 4, seed=2))
    assert one.assign(wanted) == other.project(wanted)
    assert torch.equal(update_of(one), update_of(other))
    assert fit(one, wanted) <= other.project(wanted) * (1 + 1e-9)
    assert one.assign(wanted, refine=200) < other.project(wanted)


def test_what_is_dead_stays_dead():
    form, site = fs.LoRA(rank=4), TensorSite("s", draw(INNER, WIDTH))
    delta = form.build(site, form.plan([site]))
    stir(list(delta.trained_parameters()))
    delta.switch_off(delta.groups("rank")[2])
    wanted = draw(INNER, WIDTH, seed=3)
    error = delta.assign(wanted)
    assert torch.count_nonzero(delta.A[2]) == torch.count_nonzero(delta.B[:, 2]) == 0
    small = fs.LoRA(rank=3)
    three = small.build(site, small.plan([site]))
    assert error == pytest.approx(three.assign(wanted), rel=1e-3)


@pytest.mark.parametrize("split", [(1, 4), (4, 1)])
@pytest.mark.parametrize("sizes", [(48, 20), (24, 40), (16, 16)])
@pytest.mark.parametrize("dense", [True, False])
def test_an_lsr_is_recovered_from_what_it_computes(split, sizes, dense):
    """Balanced factors are M A and B M⁻¹: with a rank of 1 on one side, and nothing padded, sums of
    as many terms."""
    form = fs.LSR(rank=4, separation_rank=2, rank_split=split)
    site = TensorSite("s", draw(*sizes, dtype=torch.float64))
    other, delta = (form.build(site, form.plan([site])).double() for _ in range(2))
    stir(list(other.trained_parameters()))
    wanted = update_of(other)
    error = delta.assign(wanted if dense else other.as_low_rank())
    assert error <= 1e-6
    assert relative(update_of(delta), wanted) <= 1e-6
