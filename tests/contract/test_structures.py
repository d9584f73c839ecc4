"""The shared suite, part one: what every structure must provide without a model."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import Bypass, DoRA, HiRA, UniLoRA
from suite import CASES, DEVICE, INNER, WIDTH, draw, every_structure, per_sample, relative, stir
from torch import nn

import finespun as fs
from finespun.contract import Plan, SiteShape, TensorSite, module_group
from finespun.errors import InputError, PlanError
from finespun.linalg import LowRank
from finespun.methods.axes import make
from finespun.methods.structures import STRUCTURES


def moved(case, dtype=torch.float32):
    """The case's delta away from its start."""
    return stirred_alike(case.delta()).to(dtype)


def stirred_alike(delta):
    """The delta with every trained parameter of it and its bank moved."""
    numbers = [*delta.trained_parameters(), *(delta.bank.parameters() if delta.bank else ())]
    stir([p for p in numbers if p.requires_grad])
    return delta


def test_every_registered_structure_is_in_the_suite():
    assert set(STRUCTURES.values()) <= {type(case.structure) for case in CASES}


@every_structure(lambda case: case.zero)
def test_the_start_changes_nothing(case):
    delta = case.delta()
    if not case.block:
        assert torch.equal(delta.dense(delta.base_weight()), torch.zeros(INNER, WIDTH))
    assert torch.count_nonzero(delta(draw(4, WIDTH))) == 0
    if (change := delta.bias_change()) is not None:
        assert torch.count_nonzero(change) == 0


@every_structure(lambda case: not case.zero)
def test_a_start_away_from_the_base_is_said_and_seen(case):
    delta = case.delta()
    assert delta(draw(4, WIDTH)).norm() > 0
    delta.keep_start()
    assert torch.count_nonzero(delta(draw(4, WIDTH))) == 0


@every_structure()
def test_forward_is_the_update_times_x(case):
    delta, x = moved(case), draw(2, 3, WIDTH)
    if case.block:
        A, B = delta.factors()
        update = delta.scale * (B.double() @ A.double())
    else:
        update = delta.dense(delta.base_weight())
    wanted = F.linear(x.double(), update.double())
    assert delta(x).shape == wanted.shape
    assert relative(delta(x), wanted) <= case.tolerance


@every_structure()
def test_what_is_written_agrees_with_itself(case):
    delta, w0 = moved(case), draw(INNER, WIDTH, seed=5) / 5
    if case.block:
        return
    free = delta if delta.origin is None else moved(dataclasses.replace(case, exact_start=False))
    assert relative(free.map_weight(w0), w0 + free.delta(w0)) <= case.tolerance
    if (pair := free.low_rank()) is not None:
        A, B = pair
        assert relative(free.delta(w0), free.scale * (B @ A)) <= case.tolerance
        assert A.shape[0] == B.shape[1]
        assert A.shape[1] == WIDTH


@every_structure(lambda case: not case.block)
def test_it_is_said_whether_the_update_depends_on_the_base(case):
    delta, w0 = moved(case), draw(INNER, WIDTH, seed=5) / 5
    same = torch.equal(delta.dense(w0), delta.dense(1 - 2 * w0))
    assert same == ("low_rank" in delta.written or not delta.reads_base)


@every_structure()
def test_as_low_rank_is_the_update(case):
    delta = moved(case)
    if case.block:
        assert delta.as_low_rank().rank == 2
        return
    update = delta.dense(delta.base_weight()).detach()
    exact = delta.as_low_rank()
    assert relative(exact.dense(), update) <= 2e-6
    two, σ = delta.as_low_rank(rank=2), torch.linalg.svdvals(update.double())
    error = float((two.dense() - update).norm())
    assert error == pytest.approx(float(σ[2:].norm()), rel=1e-4, abs=1e-5 * float(σ[0]))


@every_structure()
def test_counts_are_those_of_the_tensors(case):
    site = TensorSite("s", draw(48, 36), kind=case.structure.site_kind)
    if case.block:
        site = TensorSite("s", draw(36, 36), kind="block")
    plan = case.structure.plan([site])
    bank = case.structure.bank(plan)
    delta = case.structure.build(site, plan, bank)
    assert sum(p.numel() for p in delta.trained_parameters()) == case.structure.num_parameters(
        site.shape
    )
    shared = sum(p.numel() for p in bank.parameters()) if bank else 0
    assert shared == case.structure.num_shared_parameters(plan)
    assert (
        case.structure.total_parameters(plan) == case.structure.num_parameters(site.shape) + shared
    )


@every_structure()
def test_operations_grow_with_the_rows(case):
    shape = SiteShape("s", 40, 24)
    counts = [case.structure.flops(shape, tokens) for tokens in (1, 2, 64, 4096)]
    assert counts[0] > 0
    assert counts == sorted(set(counts))
    assert all(isinstance(count, int) for count in counts)


# Nothing of theirs is drawn: they start at constants, or from W0.
UNDRAWN = {"ia3", "oft", "boft", "miss", "mora", "c3a", "lora_xs", "shira-magnitude", "tokens"}

# Parameters at 768², FLOPs for a token at 768² and 4096², and once per step at 768²: the published
# comparison, but for LSR as (1, 4), where 64·12 would cost 52,224 and the tie goes to 48·16.
TABLE = [
    (fs.LoRA(rank=8), 12_288, 24_576, 131_072, 0),
    (fs.LSR(path="formed"), 3_584, 12_288, 65_536, 196_608),
    (fs.LSR(path="factorised", rank_split=(2, 2)), 3_584, 104_448, 540_672, 0),
    (fs.LSR(path="factorised", rank_split=(1, 4)), 3_584, 53_248, 270_336, 0),
    (
        fs.LSR(rank=64, separation_rank=4, rank_split=(8, 8), path="formed"),
        3_584,
        196_608,
        1_048_576,
        786_432,
    ),
    (
        fs.LSR(rank=64, separation_rank=4, rank_split=(8, 8), path="factorised"),
        3_584,
        122_880,
        589_824,
        0,
    ),
    (DoRA(rank=8), 13_056, 26_880, 143_360, 18 * 768 * 768),
    (HiRA(rank=8), 12_288, 2 * 768**2, 2 * 4096**2, 17 * 768 * 768),
    (UniLoRA(rank=4), 0, 12_288, 65_536, 12_288),
    (Bypass(rank=8), 12_288, 24_576, 131_072, 0),
]


@pytest.mark.parametrize(("form", "numbers", "small", "large", "step"), TABLE, ids=str)
def test_counts_of_the_comparison_table(form, numbers, small, large, step):
    layer = SiteShape("s", 768, 768)
    assert form.num_parameters(layer) == numbers
    assert form.flops(layer, 1) - form.flops(layer, 0) == small
    assert form.flops(layer, 0) == step
    wide = SiteShape("s", 4096, 4096)
    assert form.flops(wide, 1) - form.flops(wide, 0) == large


@every_structure()
def test_options_restore_the_structure(case):
    restored = type(case.structure).from_options(**case.structure.options())
    assert restored == case.structure
    with pytest.raises(InputError, match=r"seeed.*seed"):
        type(case.structure).from_options(seeed=1)


@every_structure()
def test_the_seed_fixes_every_number(case):
    first, again = case.delta(), case.delta()
    other = dataclasses.replace(case, structure=dataclasses.replace(case.structure, seed=1)).delta()
    tensors = [
        {**d.state_dict(), **(d.bank.state_dict() if d.bank else {})} for d in (first, again, other)
    ]
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    if not {case.name, case.structure.kind} & UNDRAWN:
        updates = [stirred_alike(delta).as_low_rank().dense() for delta in (again, other)]
        assert not torch.equal(*updates)


@every_structure()
def test_numbers_keep_their_precision(case):
    delta = case.delta()
    half = delta.to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} <= {torch.float32}
    assert {p.dtype for p in half.to(torch.float64).parameters()} <= {torch.float64}
    if delta.bank is not None:
        bank = delta.bank.to(torch.bfloat16)
        assert {p.dtype for p in bank.parameters()} == {torch.float32}


@every_structure()
def test_a_bad_option_is_refused_with_the_value_seen(case):
    for name, value, shown in (("dropout", 1.5, "1.5"), ("seed", -3, "-3")):
        with pytest.raises(InputError, match=shown):
            dataclasses.replace(case.structure, **{name: value})
    if hasattr(case.structure, "rank"):
        with pytest.raises(InputError, match="rank=0"):
            type(case.structure)(rank=0)
        with pytest.raises(InputError, match="-1"):
            type(case.structure)(alpha=-1.0)


@pytest.mark.parametrize("form", [fs.LoRA(rank=25), fs.LSR(rank=36)])
def test_a_rank_beyond_the_layer_is_a_plan_error(form):
    with pytest.raises(PlanError, match=r"'s'.*40x24.*at most 24"):
        form.plan([TensorSite("s", draw(40, 24))])


@every_structure()
def test_switching_the_module_off_silences_it(case):
    if not list(case.delta().trained_parameters()):
        return
    delta = moved(case)
    delta.switch_off(module_group(delta))
    assert delta.dead
    assert delta.silent
    assert torch.count_nonzero(delta(draw(4, WIDTH))) == 0
    assert torch.count_nonzero(delta.as_low_rank().dense()) == 0
    assert delta.bias_change() is None
    delta.switch_on()
    assert not delta.silent


@given(st.floats(0.0, 3.0), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_shrinking_a_group_is_the_proximal_step(threshold, rank):
    delta = fs.LoRA(rank=rank).build(
        site := TensorSite("s", torch.zeros(7, 6)), fs.LoRA(rank=rank).plan([site])
    )
    nn.init.normal_(delta.B)
    group = delta.groups("rank")[rank - 1]
    before, kept = torch.cat([p.detach().flatten() for p in group.parts(delta)]), delta.A[0].clone()
    left = group.shrink(delta, threshold)
    after = torch.cat([p.detach().flatten() for p in group.parts(delta)])
    norm = before.norm()
    assert left == pytest.approx(float((norm - threshold).clamp_min(0)), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(after, before * (1 - threshold / norm).clamp_min(0))
    assert rank == 1 or torch.equal(delta.A[0], kept)


@every_structure(per_sample)
def test_per_sample_gradients_can_be_seen_by_hooks_on_the_delta(case):
    """What moves outside `forward` is missed, and Opacus refuses modules that hold buffers."""
    delta = case.delta()
    assert "map_bias" not in delta.written
    assert delta.bank is None
    assert not list(delta.buffers())


def test_a_plan_fits_only_its_own_sites():
    a, b = SiteShape("a", 3, 4), SiteShape("b", 3, 4)
    plan = Plan((a, b))
    plan.fit([b, a])
    with pytest.raises(PlanError, match="'b'"):
        plan.fit([a])
    with pytest.raises(PlanError, match=r"3x4.*5x4"):
        plan.fit([a, SiteShape("b", 5, 4)])
    assert plan.choose("a", rank=2).choices == {"a": {"rank": 2}}
    assert plan.choices == {}


def test_a_kind_is_registered_once():
    with pytest.raises(InputError, match="lora"):
        fs.contract.register(fs.LoRA)
    with pytest.raises(InputError, match=r"'lra'.*'lora'"):
        make("lra")
    assert make("lora", r=3, lora_alpha=6.0) == fs.LoRA(rank=3, alpha=6.0)


def test_an_option_that_does_not_exist_names_the_nearest():
    with pytest.raises(InputError, match="lora has no option 'rnak'; nearest: 'rank'"):
        fs.LoRA(rnak=2)
    with pytest.raises(InputError, match="lora has no option 'r'; it is called 'rank' here"):
        fs.LoRA(r=2)
    with pytest.raises(InputError, match="nearest: 'separation_rank'"):
        dataclasses.replace(fs.LSR(), seperation_rank=2)
    with pytest.raises(InputError, match=r"LoRA takes its options by name: .*rank=\.\.\."):
        fs.LoRA(4)
    assert list(inspect.signature(fs.LoRA).parameters)[:3] == ["dropout", "seed", "rank"]
    assert pickle.loads(pickle.dumps(fs.LoRA(rank=3))) == copy.deepcopy(fs.LoRA(rank=3))


@every_structure()
def test_gate_and_exact_start_act_on_factors(case):
    delta = moved(dataclasses.replace(case, exact_start=False))
    pair = delta.low_rank()
    if pair is None:
        return
    gate = torch.linspace(0, 1, len(pair[0]), device=DEVICE)
    delta.set_gate(gate)
    A, B = delta.factors()
    assert torch.equal(A, gate[:, None] * pair[0])
    x = draw(3, WIDTH)
    wanted = x.double() @ (delta.scale * LowRank(A, B).dense().double()).T
    assert relative(delta(x), wanted) <= case.tolerance


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("lora", {"alpha": "8"}, "alpha='8' must be a number or None"),
        ("lora", {"dropout": "0.1"}, "dropout='0.1' must be a number; try 0.0"),
        ("lora", {"seed": 1.5}, "seed=1.5 must be a whole number; try 0"),
        ("lora", {"rank": True}, "rank=True must be a whole number; try 8"),
        ("lora", {"rslora": 1}, "rslora=1 must be True or False"),
        ("lsr", {"rank_split": 4}, "rank_split=4 must be whole numbers in brackets or None"),
        (
            "lsr",
            {"rank_split": (2.0, 2.0)},
            "rank_split=.* must be whole numbers in brackets or None",
        ),
        ("krona", {"factors": "ab"}, "factors='ab' must be whole numbers in brackets or None"),
        ("s2ft", {"outputs": "up"}, "outputs='up' must be names in brackets"),
    ],
)
def test_options_of_another_type_are_told(kind, options, says):
    with pytest.raises(InputError, match=says):
        make(kind, **options)
