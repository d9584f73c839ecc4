"""RandLoRA against PEFT, its rank and its counts."""

import pytest
import torch
from peers import agrees, built, fingerprint, give, moved, peft, rank, site

from finespun.contract import SiteShape
from finespun.methods.structures import RandLoRA


def test_counts():
    form = RandLoRA()
    assert form.num_parameters(SiteShape("s", 768, 768)) == 24 * (32 + 768)
    assert form.num_parameters(SiteShape("s", 1024, 100)) == 4 * (32 + 100)
    one, dense = SiteShape("s", 768, 768), 2 * 768 * 768
    assert form.flops(one, 1) - form.flops(one, 0) == 2 * dense
    assert form.flops(one, 100_000) - form.flops(one, 99_999) == dense


def test_the_rank_is_full():
    (delta,) = moved(RandLoRA(rank=10), site(96, 96))
    assert rank(delta) == 96
    assert delta.lambda_.shape == (10, 10)


@pytest.mark.parametrize("tokens", [2, 200])
def test_both_ways_to_multiply_are_one(tokens):
    for out, inner in ((24, 16), (16, 24)):
        (delta,) = moved(RandLoRA(rank=5), site(out, inner))
        A, B = delta.low_rank()
        x = torch.randn(tokens, inner).double()
        torch.testing.assert_close(delta(x), delta.scale * x @ A.T @ B.T, rtol=1e-10, atol=1e-8)
    assert not delta.direct(2, False)
    assert delta.direct(200, False)


def test_outputs_are_pefts_for_layers_of_three_shapes():
    from peft import RandLoraConfig

    shapes = ((24, 16), (12, 30), (20, 20))
    model = peft(RandLoraConfig(r=6, randlora_alpha=9), *shapes)
    form = RandLoRA(rank=6, alpha=9.0)
    deltas, _, plan = built(form, *(site(*s, f"fc{i}") for i, s in enumerate(shapes)))
    assert plan.shared == {"m": 20, "M": 30}
    for i, delta in enumerate(deltas):
        layer = getattr(model, f"fc{i}")
        A, B = layer.randlora_A["default"], layer.randlora_B["default"]
        give(delta.frozen[0], A[:, 0] / 3**0.5)
        give(delta.frozen[1], B.flatten(1) / 3**0.5)
        delta.lambda_.data.copy_(layer.randlora_lambda["default"])
        delta.gamma.data.copy_(layer.randlora_gamma["default"])
        assert agrees(delta, layer) <= 1e-5


def test_the_frozen_numbers_are_the_same_everywhere_and_shared():
    a, b = built(RandLoRA(rank=4, seed=1), site(8, 6, "a"), site(6, 8, "b"))[0]
    assert a.frozen[1].on().data_ptr() == b.frozen[1].on().data_ptr()
    assert [fingerprint(f.on()) for f in a.frozen] == ["50fe2813ffa89312", "5687403b7bc17e79"]
    assert set(a.state_dict()) == {"lambda_", "gamma"}
    assert float(a.gamma[0, 0]) == pytest.approx(1 / 6)
