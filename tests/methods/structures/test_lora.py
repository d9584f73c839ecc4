"""LoRA: its start, scale and ranks."""

import math

import pytest
import torch
from suite import draw, relative

import finespun as fs
from finespun.adapters.compact import compact
from finespun.contract import TensorSite
from finespun.errors import InputError
from finespun.linalg import LowRank
from finespun.methods.structures.lora import lora_of

SITE = TensorSite("s", draw(40, 24))


def built(form, site=SITE):
    return form.build(site, form.plan([site]))


def stirred(form):
    delta = built(form)
    torch.nn.init.normal_(delta.B)
    return delta


def test_the_scale_is_alpha_over_rank_or_its_root():
    assert fs.LoRA(rank=4).scale == 2.0
    assert fs.LoRA(rank=4, alpha=32.0).scale == 8.0
    assert fs.LoRA(rank=16, alpha=32.0, rslora=True).scale == 8.0
    assert built(fs.LoRA(rank=4, alpha=6.0)).scale == 1.5


@pytest.mark.parametrize(
    ("start", "deviation"), [("kaiming", 1 / math.sqrt(3 * 768)), ("gaussian", 1 / 8)]
)
def test_the_start_has_the_stated_variance(start, deviation):
    delta = built(fs.LoRA(rank=8, start=start), TensorSite("s", torch.zeros(96, 768)))
    assert float(delta.A.std()) == pytest.approx(deviation, rel=0.05)
    assert torch.count_nonzero(delta.B) == 0
    if start == "kaiming":
        assert delta.A.abs().max() <= 1 / math.sqrt(768)


def test_other_sites_and_seeds_start_elsewhere():
    form = fs.LoRA(rank=2)
    other = TensorSite("t", draw(40, 24))
    starts = [built(form).A, built(form, other).A, built(fs.LoRA(rank=2, seed=1)).A]
    assert all(not torch.equal(a, b) for a, b in zip(starts, starts[1:] + starts[:1]))


def test_peft_names_are_read():
    read = fs.LoRA.from_options(r=4, lora_alpha=16.0, lora_dropout=0.1, use_rslora=True)
    assert read == fs.LoRA(rank=4, alpha=16.0, dropout=0.1, rslora=True)


def test_unknown_starts_are_refused():
    with pytest.raises(InputError, match=r"'zero'.*'kaiming' or 'gaussian'"):
        fs.LoRA(start="zero")


def test_a_rank_group_is_a_row_of_a_and_a_column_of_b():
    delta = stirred(fs.LoRA(rank=5))
    before = delta.as_low_rank()
    groups = delta.groups("rank")
    assert [g.label for g in groups] == [f"rank {i}" for i in range(5)]
    assert float(groups[2].norm(delta)) == pytest.approx(
        math.hypot(float(before.A[2].norm()), float(delta.B[:, 2].norm())), rel=1e-5
    )
    delta.switch_off(groups[2])
    assert [g.label for g in delta.live("rank")] == ["rank 0", "rank 1", "rank 3", "rank 4"]
    keep = [0, 1, 3, 4]
    wanted = LowRank(before.A[keep], before.B[:, keep]).dense()
    assert relative(delta.as_low_rank().dense(), wanted) <= 1e-6


@pytest.mark.parametrize("shadow", [False, True])
def test_compact_drops_dead_ranks_and_keeps_the_update(shadow):
    form = fs.LoRA(rank=5)
    delta, plan = stirred(form), form.plan([SITE])
    if shadow:
        delta.keep_start()
        with torch.no_grad():
            delta.A.add_(0.1 * draw(5, 24, seed=4))
    for i in (0, 3):
        delta.switch_off(delta.groups("rank")[i])
    delta.set_gate(torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0]))
    update = delta.dense(SITE.weight())
    new_form, new_plan, small = compact(form, plan, {"s": delta})
    rank = small["s"].A.shape[0]
    assert new_form.kind == "lora"
    assert rank == new_plan.choices["s"]["rank"] == (2 + 2 if shadow else 2)
    assert relative(small["s"].dense(SITE.weight()), update) <= 1e-6
    again = new_form.build(SITE, new_plan)
    again.load_state_dict(small["s"].state_dict())
    assert relative(again.dense(SITE.weight()), update) <= 1e-6


def test_everything_dead_leaves_one_zero_rank():
    delta = stirred(fs.LoRA(rank=3))
    for group in delta.groups("rank"):
        delta.switch_off(group)
    small, choice = delta.compact()
    assert choice["rank"] == 1
    assert torch.count_nonzero(small.dense(SITE.weight())) == 0


def test_lora_of_an_update_is_the_update():
    update = LowRank(draw(3, 24), draw(40, 3, seed=1))
    delta, choice = lora_of(SITE, update, scale=0.5)
    assert choice == {"rank": 3, "scale": 0.5}
    assert relative(delta.dense(SITE.weight()), 0.5 * update.dense()) <= 1e-6
