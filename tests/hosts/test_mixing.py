"""Mixers that an adapter holds: several adapters at a site behind a router, at inference too."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from methods import DoRA
from suite import DEVICE, batch, draw, net
from torch import nn

import finespun as fs
from finespun.contract.mixing import MixerModule, Mixing, mount, register
from finespun.errors import InputError, PlanError, StateError
from finespun.hosts import View

SITES = ["blocks.0.up", "blocks.1.down"]
LORA = fs.LoRA(rank=3)
EXPERTS = (LORA, fs.LSR(rank=4, separation_rank=2), DoRA(rank=2))


@register
@dataclass(frozen=True, kw_only=True)
class TopK(Mixing):
    """The k members that a linear router prefers at each position, weighted by its softmax."""

    k: int = 1

    kind = "toy_top_k"

    def build(self, site):
        return Router(len(self.members), site.shape.in_features, self.k)


class Router(MixerModule):
    def __init__(self, count, width, k):
        super().__init__()
        self.weight, self.k = nn.Parameter(draw(count, width, seed=count) / width), k
        self.seen = []

    def forward(self, x, base, members):
        flat, y = x.flatten(0, -2), base.flatten(0, -2)
        p = F.linear(flat.to(self.weight.dtype), self.weight).softmax(-1)
        best = p.topk(self.k, -1).indices
        self.seen = []
        for i, member in enumerate(members.values()):
            rows = (best == i).any(-1).nonzero()[:, 0]
            self.seen.append(len(rows))
            y = y.index_add(0, rows, (p[rows, i, None] * member(flat[rows])).to(y.dtype))
        return y.view_as(base)


def fill(adapter, seed):
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.copy_(draw(*p.shape, seed=10 * seed + i) / 4)


def mixed(k=2):
    """A net with three experts of three structures, and "router", which mixes them."""
    model = net().eval()
    names = []
    for i, structure in enumerate(EXPERTS):
        names.append(f"e{i}")
        fill(fs.adapt(model, structure, SITES, (), name=names[-1]), i + 1)
    router = fs.adapt(model, LORA, SITES, (), name="router")
    view = View(model, "router")
    for site in SITES:
        view.mix(site, TopK(members=tuple(names), k=k))
    return model, router, names


def by_hand(model, x, name, names, k):
    """Expert by expert, over all positions, weighted by 0 where it was not chosen."""
    layer = model.get_submodule(name)
    weight = layer.deltas["router"].mixer.weight
    p = F.linear(x, weight).softmax(-1)
    chosen = torch.zeros_like(p).scatter(-1, p.topk(k, -1).indices, 1.0)
    fs.activate(model, None)
    base = layer(x)
    y = base
    for i, expert in enumerate(names):
        fs.activate(model, expert)
        y = y + (p * chosen)[..., i, None] * (layer(x) - base)
    fs.activate(model, "router")
    return y


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", SITES)
def test_members_run_on_the_rows_that_they_are_chosen_for(name, k):
    model, _, names = mixed(k)
    layer = model.get_submodule(name)
    x = draw(4, 3, layer.in_features, seed=7)
    torch.testing.assert_close(layer(x), by_hand(model, x, name, names, k), rtol=1e-4, atol=1e-5)
    assert sum(layer.deltas["router"].mixer.seen) == 12 * k


def test_a_router_is_trained_saved_and_lives_at_inference(tmp_path):
    model, router, names = mixed()
    weights = [model.get_submodule(s).deltas["router"].mixer.weight for s in SITES]
    assert all(any(p is w for p in router.parameters()) for w in weights)
    before = [w.detach().clone() for w in weights]
    optimizer = torch.optim.SGD(router.parameters(), 1.0)
    model(batch()).square().mean().backward()
    optimizer.step()
    assert all((w != old).any() for w, old in zip(weights, before))
    y = model(batch())
    other = net().eval()
    for name in [*names, "router"]:
        fs.Adapter(model, name).save(tmp_path / name)
        fs.load(other, tmp_path / name)
    again = other(batch())
    torch.testing.assert_close(again, y)
    fs.activate(other, None)
    fs.hosts.evict(other, "router")
    fs.activate(other, "router")
    assert torch.equal(other(batch()), again)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(twin(batch()), again)
    with fs.disabled(other):
        assert torch.equal(other(batch()), net().eval()(batch()))


def test_rows_of_a_router_are_mixed_and_others_are_not():
    model, _, _ = mixed()
    x, alone = batch(), {}
    for name in ("router", "e1", None):
        fs.activate(model, name)
        alone[name] = model(x)
    order = ["router", None, "e1", "router", "e1", None]
    with fs.rows(model, order):
        y = model(x)
    wanted = torch.stack([alone[name][i] for i, name in enumerate(order)])
    torch.testing.assert_close(y, wanted)


def test_what_a_mixer_cannot_do_is_refused(tmp_path):
    model, router, names = mixed()
    view = View(model, "router")
    with pytest.raises(StateError, match="one fits at a site"):
        view.mix(SITES[0], TopK(members=("e0",)))
    with pytest.raises(InputError, match=r"no site 'blocks\.0\.upp'"):
        view.mix("blocks.0.upp", TopK(members=("e0",)))
    with pytest.raises(InputError, match="each once"):
        TopK(members=("e0", "e0"))
    with pytest.raises(StateError, match="cannot be merged"):
        router.merge()
    with pytest.raises(InputError):
        router.export(tmp_path / "lora")
    router.save(tmp_path / "router")
    alone = net().eval()
    fs.load(alone, tmp_path / "router")
    with pytest.raises(StateError, match=r"mixes 'e0', which has no modules there: load it"):
        alone(batch())
    plan = view.plan.choose(SITES[0], mixer={"kind": "unheard_of", "members": ["e0"]})
    with pytest.raises(PlanError, match="no mixer is called 'unheard_of'"):
        mount(view.deltas[SITES[0]], plan.choices[SITES[0]])
    assert names == ["e0", "e1", "e2"]


def test_a_compacted_adapter_keeps_its_mixer():
    model, router, _ = mixed()
    fs.activate(model, "router")
    x = batch()
    y = model(x)
    for delta in router.deltas.values():
        delta.switch_off(delta.groups("rank")[0])
    router.compact()
    assert torch.equal(model(x), y)
    assert all("mixer" in d._modules for d in router.deltas.values())
    assert all("mixer" in c for c in View(model, "router").plan.choices.values())
    assert x.device.type == DEVICE.type
