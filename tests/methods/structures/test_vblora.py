"""VB-LoRA against PEFT, its bank and its counts."""

import pytest
import torch
from peers import agrees, built, moved, peft, rank, site, update

from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.methods.structures import VBLoRA


@pytest.mark.parametrize(
    ("size", "count", "operations"), [(768, 6_144, 12_288), (4096, 32_768, 65_536)]
)
def test_counts_of_the_comparison_table(size, count, operations):
    form, shape = VBLoRA(), SiteShape("s", size, size)
    assert form.num_parameters(shape) == count
    assert form.num_shared_parameters(form.plan([site(256, 256)])) == 65_536
    assert form.flops(shape, 1) - form.flops(shape, 0) == operations
    assert form.flops(shape, 0) == 4 * 4 * 2 * size


def test_outputs_are_pefts():
    from peft import VBLoRAConfig

    config = VBLoRAConfig(r=3, num_vectors=20, vector_length=4, topk=3)
    model = peft(config, (24, 16), (8, 32))
    form = VBLoRA(rank=3, num_vectors=20, vector_length=4, top_k=3)
    deltas, bank, _ = built(form, site(24, 16, "fc0"), site(8, 32, "fc1"))
    bank.vectors.data.copy_(model.fc0.vblora_vector_bank["default"])
    for delta, layer in zip(deltas, (model.fc0, model.fc1)):
        delta.logits_A.data.copy_(layer.vblora_logits_A["default"])
        delta.logits_B.data.copy_(layer.vblora_logits_B["default"])
        assert agrees(delta, layer) <= 1e-5


def test_every_piece_is_a_mixture_of_the_chosen_vectors():
    (delta,) = moved(VBLoRA(num_vectors=10, vector_length=4, top_k=2), site(96, 96))
    A, B = delta.low_rank()
    for logits, piece in (
        (delta.logits_A[1, 5], A[1, 20:24]),
        (delta.logits_B[3, 2], B[12:16, 2]),
    ):
        first, second = logits.argsort(descending=True)[:2]
        w = torch.sigmoid(logits[first] - logits[second])
        vectors = delta.bank.vectors
        torch.testing.assert_close(piece, w * vectors[first] + (1 - w) * vectors[second])
    assert rank(delta) == 4


def test_the_start_is_small_and_not_the_base():
    (delta,), bank, _ = built(VBLoRA(num_vectors=30, vector_length=8), site(64, 64))
    assert float(bank.vectors.detach().abs().max()) <= 0.02
    assert float(delta.logits_A.detach().std()) == pytest.approx(0.1, rel=0.1)
    assert 0 < float(update(delta).norm()) < 0.1


def test_what_cannot_work_is_named():
    with pytest.raises(InputError, match=r"top_k=5 of num_vectors=3"):
        VBLoRA(num_vectors=3, top_k=5)
    with pytest.raises(PlanError, match=r"vector_length=256.*out=64 and in=96.*32"):
        VBLoRA().plan([site(64, 96)])
