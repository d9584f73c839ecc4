"""Every kind of host takes the path that is the row's, and between them they take every row."""

import contextlib
import dataclasses
import itertools
import math

import pytest
import torch
from places import PLACES, set_gain
from suite import CASES, Bypass, Case, stir
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.contract import Delta
from finespun.errors import PlanError, StateError, TargetError
from finespun.hosts import paths
from finespun.kernels.lowrank import plain
from finespun.methods.structures import LoR2C

BLOCKS = (Case("lor2c", LoR2C(rank=2)), Case("bypass", Bypass(rank=2)))
FACTS = {
    # fusable, features, slice: the fixed columns of each host
    "linear": paths.LINEAR | paths.FEATURES,
    "own forward": paths.LINEAR | paths.FEATURES,
    "quantised": paths.FEATURES,
    "transposed": paths.FEATURES,
    "embedding": 0,
    "conv": 0,
    "slice": paths.FEATURES | paths.SLICE,
    "block": paths.FEATURES,
    "tied": paths.LINEAR | paths.FEATURES,
}

WHOLE = {i for i, row in enumerate(paths.TABLE) if row.path in ("fused", "operators")}
AROUND, REFUSED = 2, 4
FEATURED = {5, 6, 7, 8, 9, 10}
# The rows that are taken there, one condition at a time; a gain and a hook together are refused.
TAKEN = {
    "linear": WHOLE | {AROUND} | FEATURED,
    "own forward": {AROUND} | FEATURED,
    "quantised": {AROUND} | FEATURED,
    "transposed": {AROUND} | FEATURED,
    "embedding": {3, 7},
    "conv": {3, 7, 10},
    "slice": FEATURED - {8},
    "block": {5, 7},
    "tied": WHOLE | {AROUND} | FEATURED,
}


def held(register):
    """The condition that a hook is registered, and then removed."""

    @contextlib.contextmanager
    def condition(model, delta):
        handle = register(delta)
        yield
        handle.remove()

    return condition


def nothing(*_):
    """A hook."""


hooked = held(lambda delta: delta.register_forward_hook(nothing))
watched_backward = held(lambda delta: delta.register_full_backward_hook(nothing))
watched_everywhere = held(lambda _: nn.modules.module.register_module_forward_hook(nothing))


@contextlib.contextmanager
def replaced_forward(model, delta):
    own = delta.forward
    delta.forward = lambda x: own(x)
    yield
    del delta.forward


@contextlib.contextmanager
def dropping(model, delta):
    delta.train()
    yield
    delta.eval()


@contextlib.contextmanager
def gained(model, delta):
    set_gain(delta.site, torch.tensor(0.5))
    yield
    set_gain(delta.site, None)


@contextlib.contextmanager
def half(model, delta):
    hosts.activate(model, {"default": 0.5})
    yield
    hosts.activate(model, "default")


@contextlib.contextmanager
def beside_another(model, delta):
    hosts.activate(model, {"default": 1.0, "other": 1.0})
    yield
    hosts.activate(model, "default")


@contextlib.contextmanager
def routed(model, delta):
    with hosts.rows(model, ["default", None] * 3):
        yield


@contextlib.contextmanager
def other_merged(model, delta):
    hosts.activate(model, {"default": 1.0, "other": 1.0})
    hosts.merge(model, {"other": 1.0})
    yield
    hosts.unmerge(model)
    hosts.activate(model, "default")


@contextlib.contextmanager
def in_autocast(model, delta):
    with torch.autocast("cpu", torch.bfloat16):
        yield


# The columns that each condition switches on (in `now`) or off.
CONDITIONS = {
    hooked: (paths.WATCHED, 0),
    watched_backward: (paths.WATCHED, 0),
    watched_everywhere: (paths.WATCHED, 0),
    replaced_forward: (paths.WATCHED, 0),
    dropping: (paths.DROPS, 0),
    gained: (paths.GAIN, 0),
    half: (0, paths.UNIT),
    beside_another: (0, paths.ALONE),
    routed: (0, paths.ALONE),
    other_merged: (paths.MERGED, 0),
    in_autocast: (0, paths.ORDINARY),
}
APART = (
    {hooked, watched_backward, watched_everywhere, replaced_forward},
    {half, beside_another, routed, other_merged},
)


def together(pairs):
    """No condition, each one, and, if asked, each pair that can hold at once."""
    yield ()
    yield from ((one,) for one in CONDITIONS)
    if not pairs:
        return
    for pair in itertools.combinations(CONDITIONS, 2):
        if not any(group.issuperset(pair) for group in APART):
            yield pair


def run(layer, x):
    """Call the layer; what it refused with, or None."""
    try:
        layer(x)
    except StateError as error:
        return str(error)
    return None


def expected(place, delta, x, conditions):
    """Every column, from the facts and not from what the layer reads."""
    now = paths.ALONE | paths.UNIT | paths.ORDINARY
    for condition in conditions:
        on, off = CONDITIONS[condition]
        now = (now | on) & ~off
    fixed = FACTS[place]
    written = {n for n in ("low_rank", "through", "product") if n in type(delta).written}
    fixed |= paths.FACTORS if "low_rank" in written else 0
    fixed |= paths.THROUGH if "through" in written else 0
    may = "product" in written or type(delta).direct is not Delta.direct
    fixed |= paths.PRODUCT if may else 0
    now |= paths.PLAIN if place in ("linear", "tied") else 0
    now |= paths.START if delta.origin is not None else 0
    if fixed & paths.FEATURES and not now & paths.GAIN:
        entry = delta.site.adapter_set.attached["default"]
        rows = math.prod(x.shape[:-1]) // (2 if routed in conditions else 1)
        formed = entry.factor_cache is not None
        now |= paths.CHEAPER if delta.direct(rows, formed) else 0
    if now & paths.ORDINARY and fixed & paths.LINEAR and fixed & paths.FACTORS:
        now &= ~0 if plain(x, delta.site.layer.weight, *delta.factors()) else ~paths.ORDINARY
    return fixed | now


def adapters(name, case):
    """The place with this structure twice, or None where it is refused."""
    build, target, inputs = PLACES[name]
    torch.manual_seed(0)
    model, x = build().eval(), inputs()
    structure = dataclasses.replace(case.structure, dropout=0.3)
    options = {"tie": "both"} if name == "tied" else {}
    try:
        fs.adapt(model, structure, [target], (), "other", **options)
        adapter = fs.adapt(model, structure, [target], (), exact_start=case.exact_start, **options)
    except (TargetError, PlanError):
        return None
    stir(adapter.parameters())
    return model, adapter, target, x


def row_of(columns):
    """The number of the first row that fits, all of `where` and none of `unless`."""
    return next(
        i
        for i, row in enumerate(paths.TABLE)
        if columns & row.where == row.where and not columns & row.unless
    )


def taken(name, cases, pairs, seen):
    """The rows that these structures take at a place, under no condition, each, and in pairs; each
    is checked to be what the layer took."""
    rows = set()
    for case in cases:
        made = adapters(name, case) if case.block == (name == "block") else None
        if made is None:
            continue
        model, adapter, target, x = made
        delta = adapter.deltas[target]
        given = model.table(x).detach() if name == "tied" else x
        for conditions in together(pairs):
            if other_merged in conditions and not (delta.mergeable and name != "block"):
                continue
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for condition in conditions:
                    stack.enter_context(condition(model, delta))
                seen.clear()
                refused = run(model.layer, given)
                wanted = expected(name, delta, given, conditions)
            row = row_of(wanted)
            path = paths.TABLE[row].path
            told = f"{case.name}: {[c.__name__ for c in conditions]} {seen} {refused}"
            mine = {found for fixed, found in seen if fixed == wanted & paths.FIXED}
            assert path in mine, told
            assert (path == "refused") == (refused is not None), told
            rows.add(row)
    return rows


@pytest.fixture
def seen(monkeypatch):
    """Fixed columns and path of every choice."""
    found, choose = [], paths.choose

    def watch(fixed, now):
        path = choose(fixed, now)
        found.append((fixed, path))
        return path

    monkeypatch.setattr(paths, "choose", watch)
    return found


@pytest.mark.parametrize("name", PLACES)
def test_the_path_taken_is_the_row_s(name, seen):
    assert taken(name, (*CASES, *BLOCKS), False, seen) == TAKEN[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_the_path_taken_is_the_row_s_under_two_conditions(name, seen):
    kinds = {case.kind: case for case in reversed(CASES)}
    both = {REFUSED} if FACTS[name] & paths.FEATURES else set()
    assert taken(name, (*kinds.values(), *BLOCKS), True, seen) == TAKEN[name] | both


def test_every_row_is_taken_by_some_host():
    assert set.union(*TAKEN.values()) | {REFUSED} == set(range(len(paths.TABLE)))
