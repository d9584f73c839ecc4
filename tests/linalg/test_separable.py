"""Projection onto products of Kronecker sums: what has the form comes back exactly."""

import pytest
import torch

import finespun as fs
from finespun.contract import TensorSite
from finespun.linalg import LowRank, nearest_separable
from finespun.linalg.separable import predicted_error


def drawn(structure, out, inner, seed=0):
    site = TensorSite("w", torch.zeros(out, inner))
    plan = structure.plan([site])
    delta = structure.build(site, plan)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in delta.parameters():
            p.normal_(std=0.3)
    return site, plan, delta


@pytest.mark.parametrize("shape", [(48, 96), (64, 64), (36, 100)], ids=str)
@pytest.mark.parametrize(("rank", "terms"), [(4, 3), (6, 5), (9, 2)])
def test_an_lsr_comes_back_from_its_own_lora(shape, rank, terms):
    structure = fs.LSR(rank=rank, separation_rank=terms)
    site, plan, delta = drawn(structure, *shape)
    lora = delta.as_low_rank()
    again = structure.build(site, plan)
    assert again.project(lora) < 1e-6
    gap = (again.as_low_rank().dense() - lora.dense()).norm() / lora.norm()
    assert float(gap) < 1e-5


def test_the_better_of_two_starts_is_taken_and_predicted():
    _, plan, delta = drawn(fs.LSR(rank=4, separation_rank=4), 64, 64)
    choice, exact = plan.choices["w"], delta.as_low_rank()
    sizes = (choice["ranks"], choice["down"], choice["up"], choice["terms"])
    assert predicted_error(exact, *sizes) < 1e-6
    mixed = exact.squeeze(4)  # the same product, its factors no longer Kronecker sums
    found = nearest_separable(mixed, *sizes)
    assert found.error > 0.1
    assert 0.1 < predicted_error(mixed, *sizes) < 2 * found.error
    assert nearest_separable(mixed, *sizes, refine=100).error < found.error
    assert predicted_error(LowRank(torch.zeros(4, 64), torch.zeros(64, 4)), *sizes) == 0.0
