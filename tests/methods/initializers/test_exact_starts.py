"""Starts leave the model at its base, bit for bit, in any structure; all are saved."""

import copy
import warnings

import pytest
import torch
from starts import KINDS, LAYERS, adapted, loss, net, rows
from tiers import sampled

import finespun as fs
from finespun.driver import prepare
from finespun.errors import InputError, TrainingError
from finespun.methods.axes import AXES
from finespun.methods.composition import suits

SMALL = {
    "lora": {"rank": 4},
    "lsr": {"rank": 4, "separation_rank": 3},
    "dora": {"rank": 4},
    "tied_lora": {"rank": 4},
    "krona": {},
    "lokr": {"rank": 2},
    "gralora": {"rank": 4},
    "loha": {"rank": 2},
}
TABLE = [(kind, structure) for kind in KINDS for structure in SMALL]


def made(kind):
    return fs.make(kind, axis="initializer")


def begun(model, kind, structure, **options):
    """The adapter, or None where the two do not go together, which is said before anything runs."""
    structure = fs.make(structure, **{**SMALL[structure], **options})
    try:
        suits(made(kind), structure)
    except InputError:
        with pytest.raises(InputError, match="needs"):
            adapted(model, structure, made(kind))
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return adapted(model, structure, made(kind))


def named(pair):
    return "-".join(pair)


@pytest.mark.parametrize("pair", sampled(TABLE, 0.1, 0.4, named))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_starts_as_its_base_bit_for_bit(pair, dtype):
    kind, structure = pair
    model = net(dtype)
    x = rows(7, dtype)[0]
    before, weights = model(x), copy.deepcopy(model.state_dict())
    adapter = begun(model, kind, structure)
    assert torch.equal(model(x), before)
    if adapter is not None:
        adapter.detach()
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["lora", pytest.param("lsr", marks=pytest.mark.slow)])
def test_a_trained_start_is_saved_loaded_and_exported(kind, structure, tmp_path):
    model = net()
    adapter = begun(model, kind, structure)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    before = float(loss(model, rows()).detach())
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, rows()).backward()
        optimizer.step()
    assert float(loss(model, rows()).detach()) < before
    x = rows(7)[0]
    trained = model(x)
    adapter.save(tmp_path / "own")
    other = net()
    fs.load(other, tmp_path / "own")
    assert torch.equal(other(x), trained)
    done = adapter.export(tmp_path / "peft")
    assert done.error == 0
    third = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's folder names no base
        fs.load(third, tmp_path / "peft")
    torch.testing.assert_close(third(x), trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_equal_runs_start_equally(kind):
    first, second = (begun(net(), kind, "lsr").deltas["0"].state_dict() for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_the_structures(kind):
    for structure in ("lora", "lsr"):
        plain = fs.adapt(net(), fs.make(structure, **SMALL[structure]), LAYERS, [])
        assert begun(net(), kind, structure).num_parameters == plain.num_parameters


# --- refused, with nothing changed ----------------------------------------------------------------
@pytest.mark.parametrize("kind", sorted(AXES["initializer"].known))
def test_what_must_be_measured_needs_rows(kind):
    if not made(kind).needs:
        pytest.skip("looks at nothing")
    structure = fs.LoRAXS(rank=4, start="gradient") if kind == "lora_sb" else fs.LoRA(rank=4)
    model = net()
    with pytest.raises(InputError, match=r"pass batches|name the folder"):
        adapted(model, structure, made(kind), batches=[])
    assert "_finespun_adapters" not in model.__dict__


@pytest.mark.parametrize("kind", ["lora_ga", "eva", "corda"])
def test_rows_that_are_not_finite_are_refused(kind):
    x, y = rows()
    x[0, 0] = float("nan")
    model = net()
    with pytest.raises(TrainingError, match=r"finite|is nan"):
        adapted(model, fs.LoRA(rank=4), made(kind), [(x, y)])
    assert "_finespun_adapters" not in model.__dict__


def test_a_base_that_is_not_finite_is_refused():
    model = net()
    model[2].weight.data[0, 0] = float("inf")
    with pytest.raises(TrainingError, match="weights at '2'"):
        adapted(model, fs.LoRA(rank=4), fs.PiSSA())
    assert "_finespun_adapters" not in model.__dict__


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_have_no_weight_to_start_from(kind):
    with pytest.raises(InputError, match=r"goes around whole blocks|needs two sides"):
        suits(made(kind), fs.LoR2C())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("pissa", {"niter": -1}),
        ("pissa", {"refine": -1}),
        ("lora_ga", {"direction": "ABAB"}),
        ("lora_ga", {"scale_by": "big"}),
        ("lora_ga", {"gamma": 0.0}),
        ("corda", {"mode": "xpm"}),
        ("corda", {"damp": 0.0}),
        ("lora_sb", {"step": 0.0}),
        ("lora_sb", {"basis": "noise"}),
    ],
)
def test_options_are_checked(kind, options):
    with pytest.raises(InputError, match=f"{next(iter(options))}=.*; try"):
        fs.make(kind, axis="initializer", **options)


def test_an_odd_rank_is_refused_by_orthogonal():
    with pytest.raises(InputError, match=r"even rank.*try 4"):
        adapted(net(), fs.LoRA(rank=3), fs.Orthogonal())


def test_two_starts_are_refused():
    model = net()
    adapter = adapted(model, fs.LoRA(rank=4), fs.PiSSA())
    before = adapter.state()
    with pytest.raises(InputError, match="keeps an exact start already"):
        prepare(model, adapter.name, [fs.MiLoRA()], 1)
    assert all(torch.equal(v, adapter.state().tensors[k]) for k, v in before.tensors.items())
