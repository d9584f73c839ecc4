"""DeLoRA against its definition, PEFT, and its bound."""

import pytest
import torch
from peers import adapted, built, moved, outputs_agree, peft, rank, site, update

import finespun as fs
from finespun.contract import SiteShape
from finespun.errors import InputError
from finespun.methods.structures import DeLoRA


def test_the_update_is_its_definition():
    where = site(12, 10)
    (delta,) = moved(DeLoRA(rank=3), where)
    A, B, λ = (t.detach() for t in (delta.A, delta.B, delta.strength))
    terms = [torch.outer(B[:, i], A[i]) / (B[:, i].norm() * A[i].norm()) for i in range(3)]
    wanted = λ / 3 * sum(terms) * where.value.norm(dim=0)
    torch.testing.assert_close(update(delta), wanted)
    assert rank(delta) == 3


def test_lengths_do_not_matter_and_the_strength_bounds_the_update():
    where = site(30, 20)
    (delta,) = moved(DeLoRA(rank=4), where)
    delta.strength.data.fill_(2.0)
    before = update(delta)
    delta.A.data[1] *= 50
    delta.B.data *= 0.01
    torch.testing.assert_close(update(delta), before)
    assert float((before / where.value.norm(dim=0)).norm()) <= 2.0


def test_outputs_are_pefts():
    from peft import DeloraConfig

    layer = peft(DeloraConfig(r=4), (24, 16), bias=True).fc0
    ours, delta = adapted(DeLoRA(rank=4), layer)
    delta.A.data.copy_(layer.delora_A["default"])
    delta.B.data.copy_(layer.delora_B["default"])
    delta.strength.data.copy_(layer.delora_lambda["default"])
    torch.testing.assert_close(delta.held("norms", delta.A), layer.delora_w_norm["default"])
    assert outputs_agree(ours, layer) <= 1e-5


def test_a_drawn_start_is_the_base_with_an_exact_start_and_does_not_jump():
    jumps = {}
    for form in (DeLoRA(rank=4), DeLoRA(rank=4, start="drawn")):
        (delta,), _, _ = built(form, site(24, 16))
        if not form.starts_at_zero:
            delta.keep_start()
        w0, G = delta.base_weight(), torch.randn(24, 16)
        assert torch.count_nonzero(delta.dense(w0)) == 0
        optimizer = torch.optim.AdamW(list(delta.trained_parameters()), lr=1e-3)
        (delta.dense(w0) * G).sum().backward()
        optimizer.step()
        jumps[form.start] = float(delta.dense(w0).norm() / w0.norm())
    assert jumps["zero"] > 1
    assert jumps["drawn"] < 0.2


def test_counts_and_names():
    form = DeLoRA.from_options(r=8, delora_lambda=15.0)
    assert form == DeLoRA(rank=8, alpha=15.0)
    assert form.strength == DeLoRA().strength == 15.0
    shape = SiteShape("s", 768, 768)
    assert form.num_parameters(shape) == 12_289
    assert form.flops(shape, 1) - form.flops(shape, 0) == fs.LoRA(rank=8).flops(shape)
    with pytest.raises(InputError, match=r"'paper'.*'drawn'"):
        DeLoRA(start="paper")
