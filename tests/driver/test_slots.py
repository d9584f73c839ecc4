"""Slots: gain, overlay, mixer, perturbation, hold, and the needs that allow them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hook_toys import Alternate, Gain, Gates, Noise, Shift
from suite import draw
from test_hooks import LORA, LSR, Losing, parameters, ready, rows, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import finespun as fs
from finespun.contract import Need, ParamGroup, TrainingHooks
from finespun.driver import Driver, prepare
from finespun.errors import InputError, StateError


class Asking(TrainingHooks):
    """Does what it is given, at the first hook of each step."""

    def __init__(self, act, *needs):
        self.act, self.needs = act, frozenset(needs)

    def before_step(self, context):
        self.context = context
        self.act(context)


# --- gain -----------------------------------------------------------------------------------------
def test_gains_of_several_hooks_multiply_and_end_with_training():
    def scale(factor):
        return lambda c: [c.slots.gain(n, torch.tensor(factor)) for n in c.adapter.deltas]

    grads = []
    for hooks in ([], [0.5], [0.5, 3.0]):
        model, adapter, _, driver = ready(*(Asking(scale(f), Need.GAIN) for f in hooks))
        loss = model(**rows(1)).loss
        loss.backward()
        grads.append([p.grad.clone() for p in adapter.parameters()])
        driver.close()
        assert torch.equal(model(**rows(1)).loss, loss)
    for plain, half, both in zip(*grads):
        torch.testing.assert_close(half, 0.5 * plain)
        torch.testing.assert_close(both, 1.5 * plain)


def test_a_gain_that_follows_the_update():
    model, adapter, optimizer, _ = ready(Gain())
    for seed in range(3):
        A, B = (p.detach().clone() for p in next(iter(adapter.deltas.values())).factors())
        step(model, optimizer, seed)
        host = next(iter(adapter.deltas.values())).site
        norm = (B @ A).norm(dim=1) * next(iter(adapter.deltas.values())).scale
        torch.testing.assert_close(host.slots.gains["default"], (norm + 0.5).rsqrt())


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.ones(7), r"is \(7,\); it must be a tensor, \(\) or"),
        (2.0, "is float"),
        (torch.tensor(float("nan")), "not finite"),
    ],
)
def test_gains_are_checked(value, told):
    model, _, optimizer, _ = ready(
        Asking(lambda c: c.slots.gain(next(iter(c.adapter.deltas)), value), Need.GAIN)
    )
    with pytest.raises(InputError, match=told):
        step(model, optimizer, 1)


def test_slots_belong_to_an_adapter():
    """In rows() each row has the gain and the overlay of its own adapter."""
    model = Losing().eval()
    for name in "ab":
        fs.adapt(model, LORA, ["up"], (), name=name)
        with torch.no_grad():
            for p in (p for n, p in model.named_parameters() if f"deltas.{name}." in n):
                p.copy_(draw(*p.shape, seed=ord(name)) / 5)
    x = draw(4, 3, 24, seed=3)
    hosts = fs.hosts.hosts_of(model)
    for host in hosts.values():
        E = draw(host.shape.out_features, host.shape.in_features, seed=9) / 9
        host.slots.put("overlay", "a", "test", lambda h, E=E: F.linear(h, E))
    alone = {}
    for name in "ab":
        fs.activate(model, name)
        alone[name] = model(x).logits
    with fs.rows(model, ["a", "b", None, "a"]):
        mixed = model(x).logits
    fs.activate(model, None)
    base = model(x).logits
    wanted = torch.stack([alone["a"][0], alone["b"][1], base[2], alone["a"][3]])
    torch.testing.assert_close(mixed, wanted)
    for host in hosts.values():
        host.slots.free("test")
    fs.activate(model, "a")
    assert (model(x).logits - alone["a"]).abs().max() > 1e-3
    fs.activate(model, "b")
    assert torch.equal(model(x).logits, alone["b"])


# --- overlay --------------------------------------------------------------------------------------
def test_an_overlay_acts_in_training_alone_and_knows_its_moment():
    noise = Noise()
    model, _, optimizer, driver = ready(noise)
    quiet, _, _, _ = ready()
    model.eval(), quiet.eval()
    assert torch.equal(model(**rows(1)).logits, quiet(**rows(1)).logits)
    model.train()
    first = model(**rows(1)).logits
    assert (first - quiet(**rows(1)).logits).abs().max() > 1e-3
    step(model, optimizer, 1, micros=2)
    step(model, optimizer, 2, micros=2)
    assert set(noise.seen[-16:]) >= {(1, 0), (1, 1)}
    driver.close()
    model.eval()
    assert all(not d.site.slots.overlays for d in driver.view.deltas.values())


def test_recomputed_passes_see_the_same_overlay():
    class Deep(nn.Module):
        def __init__(self, again):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down, self.again = nn.Linear(8, 8), nn.Linear(8, 8), again

        def forward(self, x):
            def inner(h):
                return torch.tanh(self.down(torch.tanh(self.up(h))))

            return checkpoint(inner, x, use_reentrant=False) if self.again else inner(x)

    grads = []
    for again in (False, True):
        model, adapter, _, _ = ready(Noise(0.5), model=Deep(again))
        x = torch.ones(2, 8, requires_grad=True)
        model(x).sum().backward()
        grads.append([x.grad, *(p.grad for p in adapter.parameters())])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


# --- mixer ----------------------------------------------------------------------------------------
def experts(count=3):
    """A model with several adapters at the same sites, all active."""
    model = Losing()
    for i in range(count):
        adapter = fs.adapt(model, LORA, ["up"], (), name=f"e{i}")
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(draw(*p.shape, seed=20 + i) / 5)
                p.requires_grad_(True)
    fs.activate(model, [f"e{i}" for i in range(count)])
    return model


class Routed(TrainingHooks):
    """Top-1 of a trained router at every site; members see their own rows alone."""

    needs = frozenset({Need.MIXER})

    def __init__(self):
        self.routers, self.counts = {}, []

    def prepare(self, setup):
        for name, delta in setup.adapter.deltas.items():
            self.routers[name] = nn.Parameter(
                draw(3, delta.site.shape.in_features, seed=len(self.routers))
            )

    def parameters(self):
        return [ParamGroup(list(self.routers.values()))]

    def begin(self, context):
        for name in context.adapter.deltas:
            context.slots.mixer(name, self.mixer(self.routers[name]))

    def mixer(self, router):
        def mix(x, base, members):
            flat, y = x.flatten(0, -2), base.flatten(0, -2)
            p = F.linear(flat, router).softmax(-1)
            best = p.argmax(-1)
            for i, member in enumerate(members.values()):
                rows = (best == i).nonzero()[:, 0]
                self.counts.append(len(rows))
                y = y.index_add(0, rows, p[rows, i, None] * member(flat[rows]))
            return y.view_as(base)

        return mix


def test_a_mixer_with_a_router_runs_each_member_on_its_own_rows():
    model, routed = experts().train(), Routed()
    prepared = prepare(model, "e0", [routed])
    wanted = copy.deepcopy(model)
    optimizer = prepared.optimizer(0.05)
    with Driver(model, "e0", optimizer, 0.0, prepared):
        x = draw(2, 3, 24, seed=5)
        host = next(iter(fs.hosts.hosts_of(model).values()))
        y = model.inner.blocks[0].up(x)
        twin = wanted.inner.blocks[0].up
        p = F.linear(x, routed.routers["inner.blocks.0.up"]).softmax(-1)
        one_by_one = type(host.layer).__mro__[2].forward(twin, x)
        for i in range(3):
            delta = twin.deltas[f"e{i}"]
            own = (p.argmax(-1) == i)[..., None] * p[..., i, None]
            one_by_one = one_by_one + own * delta(x)
        torch.testing.assert_close(y, one_by_one)
        assert sum(routed.counts) == 6
        before = {n: r.detach().clone() for n, r in routed.routers.items()}
        step(model, optimizer, 1)
        assert any((routed.routers[n] != r).any() for n, r in before.items())
    assert all(not h.slots.mixers for h in fs.hosts.hosts_of(model).values())


def test_one_mixer_fits_at_a_site():
    model = experts().train()
    prepared = prepare(model, "e0", [Routed(), Routed()])
    with pytest.raises(StateError, match="has a mixer there already"):
        Driver(model, "e0", prepared.optimizer(0.1), 0.0, prepared)


# --- perturbation ---------------------------------------------------------------------------------
def test_a_perturbation_is_gone_at_steps_evaluations_and_saves(tmp_path):
    model, adapter, optimizer, _ = ready(Shift(rho=0.5))
    step(model, optimizer, 1)
    theta = parameters(adapter)
    optimizer.zero_grad()
    model(**rows(2)).loss.backward()
    moved = parameters(adapter)
    change = torch.cat([(a - b).flatten() for a, b in zip(moved, theta)])
    assert float(change.norm()) == pytest.approx(0.5, rel=1e-3)
    model.eval()
    model(**rows(3))
    assert all(torch.equal(a, b) for a, b in zip(parameters(adapter), theta))
    model.train()
    model(**rows(4)).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(parameters(adapter), moved))
    adapter.save(tmp_path / "saved")
    other = Losing()
    again = fs.load(other, tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(parameters(again), theta))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(parameters(adapter)))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(seen, theta))


def test_a_perturbation_must_fit():
    def wrong(context):
        context.slots.perturb({context.adapter.parameters()[0]: torch.ones(1, 2, 3)})

    model, adapter, optimizer, _ = ready(Asking(wrong, Need.PERTURBATION))
    before = parameters(adapter)
    with pytest.raises(InputError, match="does not fit a parameter of"):
        step(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(parameters(adapter), before))


# --- hold -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("structure", [LORA, LSR])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda g: torch.optim.AdamW(g, weight_decay=0.3),
        lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, weight_decay=0.3),
        lambda g: torch.optim.Adam(g, amsgrad=True),
    ],
)
def test_what_is_held_keeps_value_and_moments_for_one_step(structure, optimizer):
    hold = Alternate("rank" if structure is LORA else "term")
    model, adapter, opt, _ = ready(hold, structure=structure, optimizer=optimizer)
    for seed in range(4):
        before = {
            p: (p.detach().clone(), copy.deepcopy(dict(opt.state.get(p, {}))))
            for p in adapter.parameters()
        }
        step(model, opt, seed)
        for delta, group in hold.held:
            for name, index in group.slices:
                p = delta.get_parameter(name)
                old, state = before[p]
                assert torch.equal(p[index], old[index])
                assert not p.grad[index].any()
                assert (p != old).any()
                for key, value in opt.state[p].items():
                    if isinstance(value, torch.Tensor) and value.shape == p.shape:
                        was = state[key][index] if key in state else torch.zeros_like(value[index])
                        assert torch.equal(value[index], was), key


# --- needs ----------------------------------------------------------------------------------------
USES = {
    Need.GAIN: lambda c: c.slots.gain(next(iter(c.adapter.deltas)), torch.tensor(1.0)),
    Need.OVERLAY: lambda c: c.slots.overlay(
        next(iter(c.adapter.deltas)), lambda x, m: x.new_zeros(())
    ),
    Need.MIXER: lambda c: c.slots.mixer(
        next(iter(c.adapter.deltas)), lambda x, y, m: y + m["default"](x)
    ),
    Need.PERTURBATION: lambda c: c.slots.perturb({}),
    Need.HOLD: lambda c: c.slots.hold_still(
        next(iter(c.adapter.deltas)), next(iter(c.adapter.deltas.values())).groups("rank")[0]
    ),
    Need.TEACHER: lambda c: c.teacher(rows(1)),
    Need.REPLAY: lambda c: list(c.replay()),
}


@pytest.mark.parametrize("need", USES)
def test_what_is_not_declared_is_refused(need):
    model, _, optimizer, _ = ready(Asking(USES[need]))
    with pytest.raises(StateError, match=f"Asking uses '{need.value}'.*Need.{need.name}"):
        step(model, optimizer, 1)
    model, _, optimizer, _ = ready(Asking(USES[need], need))
    step(model, optimizer, 1)


def test_unknown_sites_and_what_was_not_given_are_named():
    model, _, optimizer, _ = ready(
        Asking(lambda c: c.slots.gain("blocks.0.ub", torch.tensor(1.0)), Need.GAIN)
    )
    with pytest.raises(InputError, match=r"no site 'blocks\.0\.ub'; nearest"):
        step(model, optimizer, 1)

    class Measuring(TrainingHooks):
        def prepare(self, setup):
            self.act(setup)

    for act, told in (
        (lambda s: s.steps, "pass steps="),
        (lambda s: s.measured.gradient("x"), "gradient at 'x' was not measured"),
        (lambda s: s.measured.activation("x"), "activation at 'x' was not measured"),
        (lambda s: s.measured.covariance("x"), "covariance at 'x' was not measured"),
    ):
        hooks = Measuring()
        hooks.act = act
        with pytest.raises(InputError, match=told):
            prepare(model, "default", [hooks])
    hooks.needs, hooks.act = frozenset({Need.HELD_OUT}), lambda s: list(s.held_out)
    with pytest.raises(InputError, match="needs held-out batches"):
        prepare(model, "default", [hooks])
    prepare(model, "default", [hooks], held_out=[rows(1)])


def test_gates_shrink_by_the_rate_of_their_own_group():
    gates = Gates(strength=2.0, lr_factor=0.5)
    model, adapter, optimizer, _ = ready(gates, lr=0.02)
    step(model, optimizer, 1)
    for delta in adapter.deltas.values():
        assert delta.get_parameter("gate").grad is not None
        assert float(delta.gate.detach().max()) < 1.0
    assert {g["lr"] for g in optimizer.param_groups} == {0.02, 0.01}
