"""Counts come from what the plan chose: after compaction, by a pattern, or by an allocation."""

import dataclasses

import pytest
from suite import INNER, WIDTH, draw, every_structure, net, stirred
from tiers import sampled

import finespun as fs
from finespun.contract import Ranked, TensorSite, module_group
from finespun.errors import InputError
from finespun.methods.structures import STRUCTURES

KINDS = ("rank", "term")


def check(adapter):
    plan, structure = adapter.entry.plan, adapter.structure
    assert adapter.num_update_parameters == structure.total_parameters(plan)
    for name, delta in adapter.deltas.items():
        count = structure.num_parameters(delta.site.shape, plan.choices[name])
        assert count == sum(p.numel() for p in delta.trained_parameters())


@every_structure(lambda case: STRUCTURES.get(case.structure.kind) is type(case.structure))
@pytest.mark.parametrize("which", sampled([slice(1, None), slice(0, 2), slice(0, None)], quick=0.0))
def test_what_is_compacted_counts_right(case, which, tmp_path):
    _, adapter = stirred(case)
    first = next(iter(adapter.deltas.values()))
    groups = [g for kind in KINDS for g in first.groups(kind)]
    for group in groups[which] or [module_group(first)]:
        first.switch_off(group)
    whole = adapter.structure.flops(first.site.shape, 1)
    adapter.compact()
    check(adapter)
    name = first.site.shape.name
    if groups and name in adapter.deltas and not adapter.structure.forms_together:
        choice = adapter.entry.plan.choices[name]
        assert adapter.structure.flops(first.site.shape, 1, choice) <= whole
    adapter.save(tmp_path)
    check(fs.load(net(), tmp_path))


def test_two_ranks_of_four_at_one_of_two_layers():
    model, adapter = net(), None
    adapter = fs.adapt(model, fs.LoRA(rank=4), ["blocks.0.up", "blocks.1.up"], ())
    first = adapter.deltas["blocks.0.up"]
    for group in first.groups("rank")[:2]:
        first.switch_off(group)
    adapter.compact()
    assert adapter.num_update_parameters == (2 + 4) * (WIDTH + INNER)
    check(adapter)
    choice = adapter.entry.plan.choices["blocks.0.up"]
    assert adapter.structure.flops(first.site.shape, 3, choice) == 2 * 3 * 2 * (WIDTH + INNER)


def registered(case):
    return STRUCTURES.get(case.structure.kind) is type(case.structure)


@every_structure(lambda case: registered(case) and isinstance(case.structure, Ranked))
def test_another_choice_at_one_site_counts_right(case):
    rows = WIDTH if case.block else INNER
    site = TensorSite("s", draw(rows, WIDTH, seed=5) / 5, draw(rows), case.structure.site_kind)
    seen = set()
    for rank in range(1, 13):
        try:
            other = dataclasses.replace(case.structure, rank=rank)
            choice = other.plan([site]).choices["s"]
        except InputError:
            continue
        plan = case.structure.plan([site]).choose("s", **choice)
        bank = case.structure.bank(plan)
        try:
            delta = case.structure.build(site, plan, bank)
        except (RuntimeError, InputError):
            continue
        count = case.structure.num_parameters(site.shape, choice)
        assert count == sum(p.numel() for p in delta.trained_parameters())
        seen.add(rank)
    assert seen


@every_structure(registered)
def test_the_sizes_of_a_structure_make_it_larger(case):
    form = case.structure
    assert form.title
    site = case.delta().site
    for name in form.sizes:
        now = getattr(form, name)
        if now is None:
            continue
        counts = {}
        for value in range(1, 25):
            try:
                other = dataclasses.replace(form, **{name: value})
                counts[value] = other.total_parameters(other.plan([site]))
            except InputError:
                continue
        assert len(counts) < 2 or counts[max(counts)] > counts[min(counts)]
