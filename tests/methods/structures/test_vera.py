"""VeRA against PEFT, its counts and what all its layers share."""

import pytest
from peers import agrees, built, fingerprint, give, moved, peft, rank, site

from finespun.contract import SiteShape
from finespun.methods.structures import VeRA


@pytest.mark.parametrize(
    ("size", "count", "operations"), [(768, 1_024, 787_456), (4096, 4_352, 4_198_656)]
)
def test_counts_of_the_comparison_table(size, count, operations):
    shape = SiteShape("s", size, size)
    assert VeRA().num_parameters(shape) == count
    assert VeRA().flops(shape) == operations


def test_the_rank_is_r():
    (delta,) = moved(VeRA(rank=24), site(96, 96))
    assert rank(delta) == 24


def test_outputs_are_pefts_for_layers_of_two_shapes():
    from peft import VeraConfig

    shapes = ((24, 16), (20, 30))
    model = peft(VeraConfig(r=12, projection_prng_key=5), *shapes)
    deltas, _, _ = built(VeRA(rank=12), *(site(*s, f"fc{i}") for i, s in enumerate(shapes)))
    A, B = model.fc0.vera_A["default"], model.fc0.vera_B["default"]
    assert (A.shape, B.shape) == ((12, 30), (24, 12))
    for delta, layer in zip(deltas, (model.fc0, model.fc1)):
        for frozen, theirs, fan in zip(delta.frozen, (A, B), (30, 12)):
            assert theirs.abs().max() <= (6 / fan) ** 0.5
            give(frozen, theirs / (6 / fan) ** 0.5)
        delta.b.data.copy_(layer.vera_lambda_b["default"])
        delta.d.data.copy_(layer.vera_lambda_d["default"])
        assert agrees(delta, layer) <= 1e-5


def test_all_layers_read_the_same_memory():
    deltas, _, _ = built(VeRA(rank=6), site(8, 10, "a"), site(12, 6, "b"))
    (A, B), (A2, B2) = (d.projections() for d in deltas)
    assert A.data_ptr() == A2.data_ptr()
    assert B.data_ptr() == B2.data_ptr()
    assert {n for n, _ in deltas[0].named_parameters()} == {"b", "d"}
    assert set(deltas[0].state_dict()) == {"b", "d"}


def test_the_frozen_numbers_are_these_everywhere():
    (delta,), _, _ = built(VeRA(rank=4, seed=1), site(8, 6))
    A, B = delta.projections()
    assert A[0, :3].tolist() == [0.8811790943145752, -0.10993385314941406, 0.22409391403198242]
    assert (fingerprint(A), fingerprint(B)) == ("e1a26be87156c57d", "f424351391a97c9a")
