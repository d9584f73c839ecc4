"""What a structure cannot do is said when it is made, planned or built, with what would do."""

import re

import pytest
import torch
from peers import site
from suite import CASES

import finespun as fs
from finespun.bench.budget import fit
from finespun.contract import SiteShape, TensorSite
from finespun.errors import FinespunError, InputError, PlanError, TargetError
from finespun.methods import structures

SITES = (site(24, 40, "up"), site(40, 24, "down"))
SHARING = [
    structures.S2LoRA(rank=4),
    structures.TiedLoRA(rank=4),
    structures.UniLoRA(rank=2, size=50),
    structures.VBLoRA(rank=2, num_vectors=6, vector_length=4),
    structures.KAdaptation(terms=4),
]
PLANNED = [
    case
    for case in CASES
    if type(case.structure).__module__.startswith("finespun.")
    and not case.block
    and case.structure.choose(TensorSite("site", torch.zeros(40, 24)))
]


def kinds(forms):
    return pytest.mark.parametrize("form", forms, ids=lambda f: f.kind)


# --- sizes that do not fit -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "form",
    [
        structures.LoRA(rank=25),
        structures.LSR(rank=64, separation_rank=1),
        structures.NOLA(rank=25),
        structures.SHiRA(rank=16),
        structures.SHiRA(rank=16, mask="structured"),
        structures.SHiRA(rank=5, mask="magnitude", skip=3),
        structures.MoRA(rank=12),
        structures.TeRA(rank=7),
        structures.LoRAXS(rank=25),
        structures.LoHa(rank=25),
        structures.UniLoRA(rank=25),
        structures.HiRA(rank=25),
        structures.DoRA(rank=25),
        structures.LoKr(rank=25),
    ],
    ids=lambda f: f"{f.kind}-{f.rank}",
)
def test_a_rank_beyond_the_layer_names_it_and_one_that_fits(form):
    with pytest.raises(PlanError, match=r"=\d+.*'up'") as error:
        form.plan(SITES)
    fits = re.findall(r"\d+", str(error.value))
    assert fits, error.value
    assert "at most" in str(error.value) or "try" in str(error.value) or "do" in str(error.value)


@pytest.mark.parametrize(
    ("form", "option"),
    [
        (structures.BlockLoRA(rank=4, blocks=5, layout="input"), "blocks"),
        (structures.C3A(block_size=5), "block_size"),
        (structures.GraLoRA(rank=14, k=7), "k"),
        (structures.KAdaptation(terms=5), "terms"),
        (structures.MELoRA(rank=14, blocks=7), "blocks"),
        (structures.OFT(block_size=7), "block_size"),
        (structures.BOFT(block_size=7), "block_size"),
        (structures.VBLoRA(rank=2, vector_length=7), "vector_length"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_a_block_that_does_not_divide_names_one_that_does(form, option):
    with pytest.raises(FinespunError, match=rf"{option}=\d.*nearest") as error:
        form.plan(SITES)
    better = int(re.findall(r"\d+", str(error.value))[-1])
    assert better > 0
    assert 24 % better == 0


@kinds([structures.LoRA(), structures.SHiRA(), structures.MoRA(), structures.GraLoRA()])
def test_a_budget_below_the_least_names_it(form):
    with pytest.raises(InputError, match=rf"{form.kind} cannot be written in 3 .* the least is \d"):
        fit(form, (), SITES, 3)


def test_a_budget_beyond_the_most_names_it():
    with pytest.raises(InputError, match=r"shira uses .* of 100,000 parameters at most"):
        fit(structures.SHiRA(), (), SITES, 100_000)


# --- plans and banks of others -------------------------------------------------------------------
@pytest.mark.parametrize("case", PLANNED, ids=lambda case: case.name)
def test_a_site_that_the_plan_does_not_hold_is_named(case):
    """Another target set: whatever reads a site's decisions says that there are none."""
    form = case.structure
    mine = TensorSite("site", torch.zeros(40, 24))
    plan = form.plan([mine])
    with pytest.raises(PlanError, match=r"no site 'sites'; nearest: 'site'"):
        form.build(TensorSite("sites", torch.zeros(40, 24)), plan, form.bank(plan))


@kinds(SHARING)
def test_the_order_of_the_targets_does_not_matter(form):
    """The same numbers for the same seed, whatever the order in which sites were found."""
    made = []
    for sites in (SITES, SITES[::-1]):
        plan = form.plan(sites)
        bank = form.bank(plan)
        built = {s.name: (form.build(s, plan, bank), s.value.float()) for s in sites}
        made.append({name: delta.dense(W0) for name, (delta, W0) in built.items()})
        plan.fit([s.shape for s in sites[::-1]])
    for name in made[0]:
        assert torch.equal(made[0][name], made[1][name])


@kinds(SHARING)
def test_another_kinds_bank_is_refused(form):
    plan = form.plan(SITES)
    other = next(f for f in SHARING if type(f.bank(f.plan(SITES))) is not type(form.bank(plan)))
    for bank in (None, other.bank(other.plan(SITES))):
        with pytest.raises(
            InputError, match=r"'up' shares trained parameters: build it with bank\(plan\)"
        ):
            form.build(SITES[0], plan, bank)


def test_a_plan_of_another_model_is_refused_when_loading(tmp_path):
    def model(width, names=("up", "down")):
        return torch.nn.ModuleDict({n: torch.nn.Linear(width, width) for n in names})

    one = model(24)
    fs.adapt(one, structures.UniLoRA(rank=2, size=40), list(one), ()).save(tmp_path)
    with pytest.raises(PlanError, match=r"'(up|down)'.*24x24.*32x32"):
        fs.load(model(32), tmp_path, force=True)
    with pytest.raises(TargetError, match=r"'down'.*nearest|'down'.*known"):
        fs.load(model(24, ("up", "side")), tmp_path, force=True)


def test_plans_compare_by_what_they_say():
    plan = structures.LoRA().plan(SITES)
    with pytest.raises(PlanError, match=r"'up'.*24x40.*24x32"):
        plan.fit([SiteShape("up", 24, 32), SITES[1].shape])
    with pytest.raises(PlanError, match=r"the plan adapts 'down', not here"):
        plan.fit([SITES[0].shape])
    with pytest.raises(PlanError, match=r"no site 'side'; known: 'down', 'up'"):
        plan.choices["side"]
