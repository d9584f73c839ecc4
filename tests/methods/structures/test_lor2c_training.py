"""LoR2C's events in training and in files."""

import pytest
import torch
from bypasses import BLOCKS, Stack, adapted, after, begun, view
from torch import nn

import finespun as fs
from finespun.adapters.keys import parsed, spelt
from finespun.driver import Driver, prepare
from finespun.errors import InputError, StateError
from finespun.methods.allocation.merge_inject import MergeInject, inject, inside, score
from finespun.methods.structures import LoR2C
from finespun.training.checkpoint import load_checkpoint, save_checkpoint


class Run:
    """A bare loop with events; its state can be taken up by another."""

    STEPS, MERGES, INJECTS = 24, 2, 1

    def __init__(self, width=8, depth=6, **options):
        self.model, self.adapter = adapted(
            targets=[*(f"layer.{i}" for i in range(depth)), "query", "value"],
            width=width, depth=depth, stir=False,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=0.02)
        form = MergeInject(merges=self.MERGES, injects=self.INJECTS, fade=5, **options)
        prepared = prepare(self.model, "default", [form], self.STEPS)
        self.events = prepared.hooks[0]
        self.driver = Driver(self.model, "default", self.optimizer, 1.0, prepared)
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(self.STEPS, 16, width, generator=g)
        self.goal = torch.randn(self.STEPS, 16, width, generator=g)

    def steps(self, count):
        losses = []
        for _ in range(count):
            i = self.driver.step
            self.optimizer.zero_grad()
            loss = (self.model(self.x[i]) - self.goal[i]).square().mean()
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def state(self):
        return {
            "step": self.driver.step,
            "adapter": spelt(self.adapter.attached.tensors()),
            "optimizer": self.optimizer.state_dict(),
            "driver": self.driver.state_dict(),
        }

    def resume(self, state):
        self.adapter.attached.load(parsed(state["adapter"]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.driver.load_state_dict(state["driver"])


def test_merged_and_injected_numbers_go_on_learning():
    """Optimisers made before the events: theirs would never see new parameters, ours has none."""
    run = Run()
    run.steps(6)
    names = [e["blocks"] for e in run.events.events]
    assert [e["event"] for e in run.events.events] == ["merge", "merge", "inject"]
    merged = next(n for n in names[1] if run.adapter.deltas[n].B.any())
    woken = inside(view(run.adapter), names[2][0])
    watched = [p for n in [merged, *woken] for p in run.adapter.deltas[n].trained_parameters()]
    dead = [d for n, d in run.adapter.deltas.items() if n not in woken and d.dead]
    for epoch in range(2):
        before = [p.detach().clone() for p in watched]
        run.model.eval(), run.model.train()
        run.steps(6)
        for p, old in zip(watched, before):
            assert (p - old).norm() > 0, epoch
        living = [d for d in run.adapter.deltas.values() if not d.dead]
        assert all(p.grad is not None for d in living for p in d.trained_parameters())
    assert len(dead) >= 2
    for p in (p for d in dead for p in d.trained_parameters()):
        assert not p.any()
        assert p.grad is None


def test_an_injected_bypass_fades():
    run = Run()
    run.steps(6)
    block = run.events.events[-1]["blocks"][0]
    gates = [float(run.adapter.deltas[block].gate[0])]
    for _ in range(5):
        run.steps(1)
        gates.append(float(run.adapter.deltas[block].gate[0]))
    assert gates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert not run.adapter.deltas[block].B.any()
    assert run.events.fading == {}


@pytest.mark.parametrize("stop", [2, 4, 6, 8, 14])
def test_a_run_taken_up_in_the_middle_ends_bit_equal(stop, tmp_path):
    whole, first, second = Run(), Run(), Run()
    losses = whole.steps(24)
    told = first.steps(stop)
    save_checkpoint(tmp_path, first.state())
    second.resume(load_checkpoint(tmp_path))
    told += second.steps(24 - stop)
    assert told == losses
    assert second.events.events == whole.events.events
    assert second.adapter.attached.plan == whole.adapter.attached.plan
    for a, b in zip(second.adapter.parameters(), whole.adapter.parameters()):
        assert torch.equal(a, b)


def test_files_keep_spans_and_what_was_woken(tmp_path):
    run = Run()
    run.steps(8)
    wanted = run.model(run.x[0])
    run.adapter.save(tmp_path / "all")
    run.adapter.compact()
    torch.testing.assert_close(run.model(run.x[0]), wanted)
    run.adapter.save(tmp_path / "small")
    for folder in ("all", "small"):
        torch.manual_seed(5)
        model = Stack(8, 6)
        again = fs.load(model, tmp_path / folder)
        torch.testing.assert_close(model(run.x[0]), wanted)
        assert again.attached.plan == (
            run.adapter.attached.plan if folder == "small" else again.attached.plan
        )
        fs.activate(model, None)
        fs.hosts.evict(model, again.name)
        again.activate()
        torch.testing.assert_close(model(run.x[0]), wanted)
    with pytest.raises(InputError, match="is a block"):
        again.export(tmp_path / "lora")
    with pytest.raises(StateError, match="cannot be merged"):
        again.merge()


@pytest.mark.parametrize("share", [False, True])
def test_what_is_left_is_counted(share):
    """12 blocks of width 768, r = 8: 4 merges leave 8 bypasses; 4 injections change no count."""
    blocks = [f"layer.{i}" for i in range(12)]
    for injects in (0, 4):
        form = LoR2C(rank=8, share=share)
        _, adapter = adapted(form, [*blocks, "query", "value"], width=768, depth=12)
        form = MergeInject(merges=4 - injects // 4, injects=injects, fade=0)
        events = begun(form, adapter, 4)
        if injects:
            events.due["merge"] = 4
        after(events, 1), after(events, 4)
        adapter.compact()
        own = (8 - injects) * 768 * 8 * (1 if share else 2) + injects * 12_288
        assert adapter.num_update_parameters == own + (768 * 8 if share else 0)
        if not share:
            assert adapter.num_update_parameters == 98_304


def test_injected_layers_alone_are_a_lora(tmp_path):
    model, adapter = adapted(depth=2, targets=[*BLOCKS[:2], "query", "value"])
    entry, x = adapter.attached, torch.randn(3, 5, 8)
    for block in BLOCKS[:2]:
        inject(view(adapter), block)
        adapter.deltas[block].switch_off(fs.contract.module_group(adapter.deltas[block]))
        for name in inside(view(adapter), block):
            nn.init.normal_(adapter.deltas[name].B, std=0.3)
    wanted = model(x)
    with pytest.raises(InputError, match="is a block"):
        adapter.export(tmp_path / "out")
    adapter.compact()
    assert {s.kind for s in entry.plan.sites} == {"linear"}
    torch.testing.assert_close(model(x), wanted)
    assert adapter.export(tmp_path / "out").error == 0
    torch.manual_seed(5)
    other = Stack(8, 2)
    fs.load(other, tmp_path / "out")
    assert (other(x) - wanted).norm() <= 1e-5 * wanted.norm()
    adapter.merge()
    assert (model(x) - wanted).norm() <= 1e-5 * wanted.norm()
    adapter.unmerge()
    adapter.detach()
    assert not hasattr(model.layer[0], "deltas")
    assert score(fs.LoRA(rank=2).build(*_site())) == 0.0


def _site():
    site = fs.contract.TensorSite("s", torch.zeros(4, 4))
    return site, fs.LoRA(rank=2).plan([site])
