"""LoR2C's two events and the rules that choose where they happen."""

import pytest
import torch
from bypasses import BLOCKS, BOTH, Stack, adapted, after, begun, by_hand, view

import finespun as fs
from finespun.errors import InputError, PlanError
from finespun.methods.allocation.merge_inject import (
    MergeInject,
    inject,
    inside,
    lone,
    merge,
    neighbours,
    span,
)
from finespun.methods.structures import LoR2C


def spread(delta, values):
    """Give B·A these singular values."""
    r, d = delta.A.shape
    left, right = (torch.linalg.qr(torch.randn(d, r))[0] for _ in range(2))
    delta.A.data.copy_(right.T)
    delta.B.data.copy_(left * torch.tensor(values))


FLAT, STEEP = [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.01, 0.01]


@pytest.mark.parametrize("steep_one", [0, 1])
def test_a_merge_keeps_the_flatter_spectrum(steep_one):
    model, adapter = adapted()
    pair = [adapter.deltas["layer.1"], adapter.deltas["layer.2"]]
    for i, delta in enumerate(pair):
        spread(delta, STEEP if i == steep_one else FLAT)
    kept = pair[1 - steep_one]
    update = (kept.scale * kept.B @ kept.A).detach().clone()
    merge(view(adapter), "layer.1", "layer.2")
    assert span(view(adapter), f"layer.{2 - steep_one}") == ("layer.1", "layer.2")
    assert not pair[steep_one].B.any()
    torch.testing.assert_close(kept.dense(None), update)
    plain, x = Stack(), torch.randn(3, 5, 8)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(x), by_hand(plain, adapter, x))


def test_a_merge_may_keep_the_first_or_the_best_sum():
    for keep, empty in (("first", None), ("svd", "layer.2")):
        _, adapter = adapted()
        one, other = adapter.deltas["layer.1"], adapter.deltas["layer.2"]
        spread(one, STEEP)
        if empty:
            other.B.data.zero_()
        before = one.dense(None).detach().clone()
        merge(view(adapter), "layer.1", "layer.2", keep)
        assert span(view(adapter), "layer.1") == ("layer.1", "layer.2")
        assert (one.dense(None) - before).norm() <= 1e-6 * before.norm()
    _, adapter = adapted()
    one, other = adapter.deltas["layer.0"], adapter.deltas["layer.1"]
    both = (one.dense(None) + other.dense(None)).detach()
    merge(view(adapter), "layer.0", "layer.1", "svd")
    σ = torch.linalg.svdvals(both)
    assert float((one.dense(None) - both).detach().norm()) == pytest.approx(
        float(σ[4:].norm()), rel=1e-4
    )
    _, adapter = adapted(LoR2C(rank=4, share=True))
    one, other = adapter.deltas["layer.0"], adapter.deltas["layer.1"]
    both = (one.dense(None) + other.dense(None)).detach()
    merge(view(adapter), "layer.0", "layer.1", "svd")
    torch.testing.assert_close(one.dense(None), both)


def test_merged_again_a_span_grows():
    _, adapter = adapted()
    merge(view(adapter), "layer.1", "layer.2", "first")
    assert neighbours(view(adapter)) == [("layer.0", "layer.1"), ("layer.1", "layer.3")]
    merge(view(adapter), "layer.0", "layer.1", "first")
    assert span(view(adapter), "layer.0") == ("layer.0", "layer.2")
    assert neighbours(view(adapter)) == [("layer.0", "layer.3")]
    assert lone(view(adapter)) == ["layer.3"]


def test_sleeping_layers_do_nothing_until_they_are_woken():
    model, adapter = adapted(stir=False)
    plain, x = Stack(), torch.randn(3, 8)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(x), plain(x))
    names = inside(view(adapter), "layer.2")
    assert names == ["layer.2.query", "layer.2.value"]
    assert all(not adapter.deltas[n].A.any() for n in names)
    assert all(adapter.deltas[n].A.shape == (2, 8) for n in names)
    inject(view(adapter), "layer.2")
    assert all(adapter.deltas[n].A.all() and not adapter.deltas[n].B.any() for n in names)
    assert torch.equal(model(x), plain(x))
    _, bare = adapted(targets=BLOCKS)
    with pytest.raises(InputError, match=r"'layer.2'.*'query'"):
        inject(view(bare), "layer.2")


def test_a_layer_outside_all_blocks_is_refused():
    with pytest.raises(PlanError, match=r"'layer.3.query'.*none of the targets"):
        fs.adapt(Stack(), LoR2C(rank=2), ["layer.0", "layer.3.query"], train_modules=())


def test_the_rules_choose_by_the_spectrum():
    for flattest, pair in ((False, ["layer.2", "layer.3"]), (True, ["layer.0", "layer.1"])):
        _, adapter = adapted()
        for name, values in zip(BLOCKS, (FLAT, FLAT, STEEP, STEEP)):
            spread(adapter.deltas[name], values)
        events = begun(MergeInject(merges=1, injects=1, flattest=flattest, fade=0), adapter, 4)
        after(events, 1)
        assert [e["event"] for e in events.events] == ["merge", "inject"]
        assert events.events[0]["blocks"] == pair
        left = {"layer.0", "layer.1"} if not flattest else {"layer.2", "layer.3"}
        assert events.events[1]["blocks"][0] in left
        assert events.events[1]["sfs"] == min(events.events[1]["sfs"], 0.51)


def test_events_fall_into_the_first_quarter():
    _, adapter = adapted(depth=12, targets=[f"layer.{i}" for i in range(12)] + BOTH[4:])
    events = begun(MergeInject(merges=4, injects=3, fade=0), adapter, 80)
    for step in range(1, 81):
        after(events, step)
    when = [(e["step"], e["event"]) for e in events.events]
    assert [s for s, what in when if what == "merge"] == [5, 10, 15, 20]
    assert [s for s, what in when if what == "inject"] == [7, 14, 20]


def test_what_cannot_be_done_is_refused_before_training():
    _, adapter = adapted()
    for options, told in (
        ({"merges": 4}, "merges=4.*3 neighbouring"),
        ({"merges": 1, "injects": 3}, "injects=3.*2 bypasses"),
        ({"fade": -1}, "fade=-1"),
        ({"keep": "last"}, "'last'"),
    ):
        with pytest.raises(InputError, match=told):
            begun(MergeInject(**options), adapter, 10)
    for form in (LoR2C(rank=1), fs.LoRA(rank=2)):
        _, other = adapted(form, BLOCKS if form.kind == "lor2c" else ["query"], stir=False)
        with pytest.raises(InputError, match="rank 2 or more"):
            begun(MergeInject(merges=1), other, 10)


def test_merges_alone_need_no_targets_inside():
    for merges in (1, 3):
        _, adapter = adapted(targets=BLOCKS)
        events = begun(MergeInject(merges=merges), adapter, 4)
        after(events, 1), after(events, 4)
        assert [e["event"] for e in events.events] == ["merge"] * merges
        told = [*events.news(1), *events.news(4)]
        assert len(told) == merges
        assert all("merge of layer." in text and "sfs" in text for text in told)
    assert events.news(2) == []


def test_a_fade_ends_within_the_run():
    _, adapter = adapted()
    with pytest.raises(InputError, match=r"fade=16 does not end in 20 steps: 15 of them.*fade=7"):
        begun(MergeInject(injects=1, fade=16), adapter, 20)
    begun(MergeInject(injects=1, fade=15), adapter, 20)
    begun(MergeInject(merges=1, fade=16), adapter, 20)


def test_only_neighbours_merge():
    _, adapter = adapted()
    before = {n: p.detach().clone() for n, p in adapter.model.named_parameters()}
    for pair in (
        ("layer.0", "layer.2"),
        ("layer.0", "layer.0"),
        ("layer.1", "layer.0"),
        ("a", "b"),
    ):
        with pytest.raises(InputError, match="are no neighbouring bypasses"):
            merge(view(adapter), *pair)
    with pytest.raises(InputError, match="keep='richest' is not known; try 'richer'"):
        merge(view(adapter), "layer.0", "layer.1", "richest")
    assert all(torch.equal(p, before[n]) for n, p in adapter.model.named_parameters())
    assert len(adapter.attached.plan.choices) == len(adapter.deltas)
