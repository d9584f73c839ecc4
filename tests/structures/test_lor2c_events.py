"""LoR2C's spans, merges and injections: in a forward pass, in training, in files."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from peers import largest_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import finespun as fs
from finespun.allocation import MergeInject, inject, merge
from finespun.allocation.lor2c import inside, lone, neighbours, score, span
from finespun.driver import Driver
from finespun.errors import InputError, PlanError, StateError
from finespun.hosts import link
from finespun.structures import LoR2C

BLOCKS = [f"layer.{i}" for i in range(4)]
BOTH = [*BLOCKS, "query", "value"]


class Block(nn.Module):
    """h + value(tanh(query(h)))."""

    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, h):
        return h + self.value(torch.tanh(self.query(h)))


class Stack(nn.Module):
    """Blocks in a row; `how` says how each of them is called."""

    def __init__(self, width=8, depth=4):
        super().__init__()
        self.layer = nn.ModuleList(Block(width) for _ in range(depth))
        self.how = lambda layer, h: layer(h)

    def forward(self, h):
        for layer in self.layer:
            h = self.how(layer, h)
        return h


def adapted(form=None, targets=BOTH, width=8, depth=4, stir=True):
    """A stack with LoR2C on it, every living number moved."""
    torch.manual_seed(5)
    model = Stack(width, depth)
    adapter = fs.adapt(model, form or LoR2C(rank=4), targets, train=())
    if stir:
        for name, delta in adapter.deltas.items():
            if "." not in name.removeprefix("layer."):
                nn.init.normal_(delta.B, std=0.1)
    return model, adapter


def around(adapter, **spans):
    """Let bypasses go around other blocks: layer_1=(0, 2)."""
    for name, (first, last) in spans.items():
        name = name.replace("_", ".")
        ends = [f"layer.{first}", f"layer.{last}"]
        adapter.entry.plan = adapter.entry.plan.choose(name, span=ends)
    link(adapter.name, adapter.entry.plan, adapter.deltas)


def by_hand(plain, adapter, x):
    """Every span written out, from the plan alone."""
    seen, outs = [], x
    for i, layer in enumerate(plain.layer):
        seen.append(outs)
        outs = layer(outs)
        for name, delta in adapter.deltas.items():
            first, last = span(adapter.entry, name)
            if last == f"layer.{i}" and name.count(".") == 1:
                A, B = delta.factors()
                outs = outs + delta.scale * seen[int(first[-1])] @ A.T @ B.T
    return outs


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "spans", [{"layer_0": (0, 2)}, {"layer_2": (0, 2), "layer_1": (1, 3)}, {"layer_3": (1, 1)}]
)
def test_a_span_reads_at_its_first_block_and_adds_at_its_last(share, spans):
    model, adapter = adapted(LoR2C(rank=2, share=share), BLOCKS)
    plain, x = Stack(), torch.randn(3, 5, 8)
    plain.load_state_dict(model.state_dict(), strict=False)
    around(adapter, **spans)
    with torch.no_grad():
        wanted = by_hand(plain, adapter, x)
        assert (model(x) - wanted).norm() <= 1e-6 * wanted.norm()
        assert (plain(x) - wanted).norm() > 1e-2
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.layer))):
        layers = copied.layer if isinstance(copied, Stack) else copied
        assert layers[0] is not model.layer[0]
    torch.testing.assert_close(copy.deepcopy(model)(x), wanted)


def test_gradients_through_a_span_are_autograd_s():
    model, adapter = adapted(LoR2C(rank=2), BLOCKS)
    plain, x = Stack(), torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    plain.load_state_dict(model.state_dict(), strict=False)
    around(adapter, layer_1=(0, 2), layer_2=(2, 3))
    model.double(), plain.double()
    targets = [x, *adapter.parameters()]
    got = torch.autograd.grad(model(x).square().sum(), targets)
    wanted = torch.autograd.grad(by_hand(plain, adapter, x).square().sum(), targets)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def grads(model, adapter, *inputs):
    """Gradients of the sum over several forwards, all of them before the first backward."""
    for p in adapter.parameters():
        p.grad = None
    losses = [model(x).square().sum() for x in inputs]
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in adapter.parameters()]


def test_recomputed_activations_give_the_same_gradients():
    model, adapter = adapted(LoR2C(rank=2), BLOCKS)
    around(adapter, layer_0=(0, 2), layer_2=(1, 3))
    inputs = [torch.randn(3, 5, 8, requires_grad=True) for _ in range(2)]
    wanted = grads(model, adapter, *inputs)
    model.how = lambda layer, h: checkpoint(layer, h, use_reentrant=False)
    for a, b in zip(grads(model, adapter, *inputs), wanted):
        torch.testing.assert_close(a, b)
    waiting = [
        k
        for h in fs.hosts.hosts_of(model).values()
        for s in h.ends["default"]
        for k in s.now.values()
    ]
    assert not any(isinstance(k, torch.Tensor) or k() is not None for k in waiting)
    model.how = lambda layer, h: checkpoint(layer, h, use_reentrant=True)
    with pytest.raises(StateError, match=r"'layer.1'.*use_reentrant=False"):
        grads(model, adapter, inputs[0])


SIZE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def decoder():
    """A tiny Llama with one bypass around all its blocks."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZE, num_key_value_heads=1, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config)
    adapter = fs.adapt(model, LoR2C(rank=2), r"model\.layers\.\d", train=())
    for delta in adapter.deltas.values():
        nn.init.normal_(delta.B)
    names = list(adapter.deltas)
    adapter.entry.plan = adapter.entry.plan.choose(names[0], span=[names[0], names[2]])
    link(adapter.name, adapter.entry.plan, adapter.deltas)
    return model, adapter, torch.arange(21).view(3, 7) + 3


def test_transformers_checkpointing_gives_the_same_gradients():
    model, adapter, ids = decoder()
    found = []
    for _ in range(2):
        losses = [model.train()(input_ids=ids, labels=ids + i).loss for i in range(2)]
        found.append([torch.autograd.grad(loss, adapter.parameters()) for loss in losses])
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for plain, recomputed in zip(*found):
        for a, b in zip(plain, recomputed):
            torch.testing.assert_close(b, a)


def test_generation_is_the_same_with_and_without_a_cache():
    model, _, ids = decoder()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    with_cache, without = (
        model.eval().generate(ids, use_cache=cache, **options) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_a_span_that_cannot_know_its_input_is_refused():
    model, adapter = adapted(LoR2C(rank=2), BLOCKS)
    around(adapter, layer_0=(0, 2))
    with pytest.raises(StateError, match=r"'layer.0'.*not run before"):
        model.layer[2](torch.randn(3, 8))
    model.layer[0](torch.randn(4, 8))
    with pytest.raises(StateError, match=r"\(3, 8\).*was given \(4, 8\)"):
        model.layer[2](torch.randn(3, 8))
    with pytest.raises(PlanError, match=r"'layer.9'.*nearest"):
        around(adapter, layer_0=(0, 9))
    for wrong in (3, ["layer.0"], "layer.0"):
        with pytest.raises(PlanError, match="a first and a last block"):
            link("default", adapter.entry.plan.choose("layer.0", span=wrong), adapter.deltas)


def test_a_block_that_runs_twice_is_bypassed_twice():
    """As in ALBERT, where one block stands for all layers."""
    model, adapter = adapted(LoR2C(rank=2), ["layer.0"], depth=1)
    plain, x = Stack(depth=1), torch.randn(3, 8)
    plain.load_state_dict(model.state_dict(), strict=False)
    (delta,) = adapter.deltas.values()
    update = (delta.scale * delta.B @ delta.A).T
    wanted = plain(x) + x @ update
    wanted = plain(wanted) + wanted @ update
    torch.testing.assert_close(model(model(x)), wanted)
    assert neighbours(adapter.entry) == []


def test_no_matrix_of_the_width_is_made():
    """The published code keeps and multiplies a zero matrix of the hidden size for each bypass."""
    model, adapter = adapted(LoR2C(rank=2), BLOCKS, width=64)
    around(adapter, layer_0=(0, 2))
    x = torch.randn(5, 64)
    for layer in model.layer:
        layer.query, layer.value = nn.Identity(), nn.Identity()
    assert largest_tensor(lambda: model(x).square().sum().backward()) == 5 * 64
    assert all(
        t.numel() <= 2 * 64 for d in adapter.deltas.values() for t in d.state_dict().values()
    )


def test_spans_serve_rows_and_threads_apart():
    model, adapter = adapted(LoR2C(rank=2), BLOCKS)
    around(adapter, layer_0=(0, 2))
    x = torch.randn(4, 5, 8)
    with adapter.disabled():
        base = model(x)
    whole = model(x)
    with fs.rows(model, ["default", None, None, "default"]):
        mixed = model(x)
    torch.testing.assert_close(mixed[[0, 3]], whole[[0, 3]])
    torch.testing.assert_close(mixed[[1, 2]], base[[1, 2]])
    results = {}
    inputs = {i: torch.randn(3, 5, 8) for i in range(4)}
    wanted = {i: model(v).detach() for i, v in inputs.items()}
    meet = threading.Barrier(4)
    model.how = lambda layer, h: (meet.wait(), layer(h))[1]

    def run(i):
        results[i] = model(inputs[i]).detach()

    threads = [threading.Thread(target=run, args=(i,)) for i in inputs]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(torch.equal(results[i], wanted[i]) for i in inputs)


def test_a_span_compiles_in_one_graph():
    model, adapter = adapted(LoR2C(rank=2), BLOCKS)
    around(adapter, layer_0=(0, 2))
    x = torch.randn(3, 5, 8)
    wanted = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), wanted)


# --- the two events ---------------------------------------------------------------------------
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
    merge(adapter.entry, "layer.1", "layer.2")
    assert span(adapter.entry, f"layer.{2 - steep_one}") == ("layer.1", "layer.2")
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
        merge(adapter.entry, "layer.1", "layer.2", keep)
        assert span(adapter.entry, "layer.1") == ("layer.1", "layer.2")
        assert (one.dense(None) - before).norm() <= 1e-6 * before.norm()
    _, adapter = adapted()
    one, other = adapter.deltas["layer.0"], adapter.deltas["layer.1"]
    both = (one.dense(None) + other.dense(None)).detach()
    merge(adapter.entry, "layer.0", "layer.1", "svd")
    σ = torch.linalg.svdvals(both)
    assert float((one.dense(None) - both).detach().norm()) == pytest.approx(
        float(σ[4:].norm()), rel=1e-4
    )
    _, adapter = adapted(LoR2C(rank=4, share=True))
    one, other = adapter.deltas["layer.0"], adapter.deltas["layer.1"]
    both = (one.dense(None) + other.dense(None)).detach()
    merge(adapter.entry, "layer.0", "layer.1", "svd")
    torch.testing.assert_close(one.dense(None), both)


def test_merged_again_a_span_grows():
    _, adapter = adapted()
    merge(adapter.entry, "layer.1", "layer.2", "first")
    assert neighbours(adapter.entry) == [("layer.0", "layer.1"), ("layer.1", "layer.3")]
    merge(adapter.entry, "layer.0", "layer.1", "first")
    assert span(adapter.entry, "layer.0") == ("layer.0", "layer.2")
    assert neighbours(adapter.entry) == [("layer.0", "layer.3")]
    assert lone(adapter.entry) == ["layer.3"]


def test_sleeping_layers_do_nothing_until_they_are_woken():
    model, adapter = adapted(stir=False)
    plain, x = Stack(), torch.randn(3, 8)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(x), plain(x))
    names = inside(adapter.entry, "layer.2")
    assert names == ["layer.2.query", "layer.2.value"]
    assert all(not adapter.deltas[n].A.any() for n in names)
    assert all(adapter.deltas[n].A.shape == (2, 8) for n in names)
    inject(adapter.entry, "layer.2")
    assert all(adapter.deltas[n].A.all() and not adapter.deltas[n].B.any() for n in names)
    assert torch.equal(model(x), plain(x))
    _, bare = adapted(targets=BLOCKS)
    with pytest.raises(InputError, match=r"'layer.2'.*'query'"):
        inject(bare.entry, "layer.2")


def test_a_layer_outside_all_blocks_is_refused():
    with pytest.raises(PlanError, match=r"'layer.3.query'.*none of the targets"):
        fs.adapt(Stack(), LoR2C(rank=2), ["layer.0", "layer.3.query"], train=())


def test_the_rules_choose_by_the_spectrum():
    for flattest, pair in ((False, ["layer.2", "layer.3"]), (True, ["layer.0", "layer.1"])):
        _, adapter = adapted()
        for name, values in zip(BLOCKS, (FLAT, FLAT, STEEP, STEEP)):
            spread(adapter.deltas[name], values)
        events = MergeInject(adapter.entry, 4, merges=1, injects=1, flattest=flattest, fade=0)
        events.after_step(1)
        assert [e["event"] for e in events.events] == ["merge", "inject"]
        assert events.events[0]["blocks"] == pair
        left = {"layer.0", "layer.1"} if not flattest else {"layer.2", "layer.3"}
        assert events.events[1]["blocks"][0] in left
        assert events.events[1]["sfs"] == min(events.events[1]["sfs"], 0.51)


def test_events_fall_into_the_first_quarter():
    _, adapter = adapted(depth=12, targets=[f"layer.{i}" for i in range(12)] + BOTH[4:])
    events = MergeInject(adapter.entry, 80, merges=4, injects=3, fade=0)
    for step in range(1, 81):
        events.after_step(step)
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
            MergeInject(adapter.entry, 10, **options)
    for form in (LoR2C(rank=1), fs.LoRA(rank=2)):
        _, other = adapted(form, BLOCKS if form.kind == "lor2c" else ["query"], stir=False)
        with pytest.raises(InputError, match="rank 2 or more"):
            MergeInject(other.entry, 10, merges=1)


# --- in training --------------------------------------------------------------------------------
class Run:
    """A bare loop with events; its state can be taken up by another."""

    STEPS, MERGES, INJECTS = 24, 2, 1

    def __init__(self, width=8, depth=6, **options):
        self.model, self.adapter = adapted(
            targets=[*(f"layer.{i}" for i in range(depth)), "query", "value"],
            width=width, depth=depth, stir=False,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=0.02)
        self.events = MergeInject(
            self.adapter.entry, self.STEPS, self.MERGES, self.INJECTS, fade=5, **options
        )
        self.driver = Driver(self.model, "default", self.optimizer, 1.0, [self.events])
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
            "adapter": fs.hosts.tensors_of(self.adapter.entry),
            "optimizer": self.optimizer.state_dict(),
            "driver": self.driver.state_dict(),
        }

    def resume(self, state):
        fs.hosts.load_tensors(self.adapter.entry, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.driver.load_state_dict(state["driver"])


def test_merged_and_injected_numbers_go_on_learning():
    """Optimisers made before the events: theirs would never see new parameters, ours has none."""
    run = Run()
    run.steps(6)
    names = [e["blocks"] for e in run.events.events]
    assert [e["event"] for e in run.events.events] == ["merge", "merge", "inject"]
    merged = next(n for n in names[1] if run.adapter.deltas[n].B.any())
    woken = inside(run.adapter.entry, names[2][0])
    watched = [p for n in [merged, *woken] for p in run.adapter.deltas[n].numbers()]
    dead = [d for n, d in run.adapter.deltas.items() if n not in woken and d.masks()]
    for epoch in range(2):
        before = [p.detach().clone() for p in watched]
        run.model.eval(), run.model.train()
        run.steps(6)
        for p, old in zip(watched, before):
            assert (p - old).norm() > 0, epoch
        assert all(p.grad is not None for p in run.adapter.parameters())
    silent = [d for d in dead if not any(m.any() for m in d.masks().values())]
    assert len(silent) >= 2
    for p in (p for d in silent for p in d.numbers()):
        assert not p.any()
        assert not any(v.any() for v in run.optimizer.state[p].values() if v.shape == p.shape)


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
    from finespun.files import load_checkpoint, save_checkpoint

    whole, first, second = Run(), Run(), Run()
    losses = whole.steps(24)
    told = first.steps(stop)
    save_checkpoint(tmp_path, first.state())
    second.resume(load_checkpoint(tmp_path))
    told += second.steps(24 - stop)
    assert told == losses
    assert second.events.events == whole.events.events
    assert second.adapter.entry.plan == whole.adapter.entry.plan
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
        assert again.entry.plan == (
            run.adapter.entry.plan if folder == "small" else again.entry.plan
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
        events = MergeInject(adapter.entry, 4, merges=4 - injects // 4, injects=injects, fade=0)
        if injects:
            events.due["merge"] = 4
        events.after_step(1), events.after_step(4)
        adapter.compact()
        own = (8 - injects) * 768 * 8 * (1 if share else 2) + injects * 12_288
        assert adapter.num_parameters == own + (768 * 8 if share else 0)
        if not share:
            assert adapter.num_parameters == 98_304


def test_injected_layers_alone_are_a_lora(tmp_path):
    model, adapter = adapted(depth=2, targets=[*BLOCKS[:2], "query", "value"])
    entry, x = adapter.entry, torch.randn(3, 5, 8)
    for block in BLOCKS[:2]:
        inject(entry, block)
        adapter.deltas[block].switch_off(fs.structures.module_group(adapter.deltas[block]))
        for name in inside(entry, block):
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
    site = fs.structures.TensorSite("s", torch.zeros(4, 4))
    return site, fs.LoRA(rank=2).plan([site])
