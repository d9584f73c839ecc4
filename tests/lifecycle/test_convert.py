"""Adapters made into others on files: what is exact is exact, what is lost is told."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_folders import bert, edit, fresh, gpt2, in_peft, logits
from suite import Case, every, relative, stir
from torch import nn

import finespun as fs
from finespun import files
from finespun.adapters.deltas import Deltas
from finespun.errors import FileError, InputError
from finespun.lifecycle.conversion.facts import compare
from finespun.lifecycle.stored import StoredWeights
from finespun.linalg import LowRank, predicted_error

TARGETS = ("query", "value")
FACTORS = {
    "lora": {},
    "lsr": {},
    "nola": {"k": 32},
    "lora_xs": {},
    "vera": {"rank": 8},
    "unilora": {},
}


def updates(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of every site of the adapter in a folder, dense and in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = fs.load(model, folder)
    found = {n: (u.B.double() @ u.A.double()).detach() for n, u in adapter.updates().items()}
    adapter.detach()
    return found


def saved_lora(folder: Path, rank: int = 6, **options: object) -> Path:
    fresh(bert(), fs.LoRA(rank=rank, alpha=3.0, **options), TARGETS).save(folder)
    return folder


# --- to a LoRA -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", FACTORS)
def test_whatever_has_factors_becomes_an_exact_lora(tmp_path, kind):
    model = bert()
    adapter = fresh(model, fs.make(kind, **FACTORS[kind]), TARGETS)
    wanted = logits(model)
    adapter.save(tmp_path / "a")
    base = None
    if kind == "lora_xs":
        adapter.detach()
        model.save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
    done = fs.convert(tmp_path / "a", tmp_path / "b", "lora", model=base)
    assert done.error < 1e-6
    other = bert()
    fs.load(other, tmp_path / "b")
    assert relative(logits(other), wanted) < 1e-5
    assert str(done).endswith("exact to rounding")


DENSE = {
    "shira": {"rank": 2},
    "loha": {"rank": 5},
    "lokr": {"rank": 24, "factor": 4},
    "krona": {},
    "mora": {"rank": 2},
    "c3a": {"block_size": 4},
    "fourierft": {"frequencies": 40},
}


@pytest.mark.parametrize("kind", DENSE)
def test_updates_without_factors_are_read_without_their_base_where_it_does_not_matter(
    tmp_path, kind
):
    adapter = fresh(bert(), fs.make(kind, **DENSE[kind]), TARGETS)
    wanted = {n: u.dense().double() for n, u in adapter.updates().items()}
    adapter.save(tmp_path / "a")
    done = fs.convert(tmp_path / "a", tmp_path / "b", fs.LoRA(rank=3))
    for name, values in {n: torch.linalg.svdvals(W) for n, W in wanted.items()}.items():
        lost = float(values[3:].norm() / values.norm())
        assert done.errors[name] == pytest.approx(lost, abs=1e-6)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.cosine == pytest.approx((1 - found.distance**2) ** 0.5, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_squeezing_has_the_error_of_the_singular_values(tmp_path, rank):
    saved_lora(tmp_path / "a")
    done = fs.convert(tmp_path / "a", tmp_path / "b", fs.LoRA(rank=rank))
    before, after = updates(bert(), tmp_path / "a"), updates(bert(), tmp_path / "b")
    for name, delta in before.items():
        values = torch.linalg.svdvals(delta)
        lost = float(values[rank:].norm() / values.norm())
        assert done.errors[name] == pytest.approx(lost, abs=1e-6)
        assert relative(after[name], delta) == pytest.approx(lost, abs=1e-6)
        assert done.ranks[name] == min(rank, 6)
    saved = files.read_adapter(tmp_path / "b")
    assert done.after == saved.state.num_parameters == min(rank, 6) * 4 * 48
    assert saved.state.structure == fs.LoRA(rank=rank)


def test_the_factors_of_a_squeezed_lora_are_balanced(tmp_path):
    saved_lora(tmp_path / "a")
    fs.convert(tmp_path / "a", tmp_path / "b", fs.LoRA(rank=3, alpha=24))
    for tensors in [files.read_adapter(tmp_path / "b").state.tensors]:
        for key, A in tensors.items():
            if key.name == "A":
                B = tensors[key._replace(name="B")]
                assert torch.allclose(A @ A.T, B.T @ B, atol=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_a_share_of_the_energy_chooses_ranks(tmp_path, energy):
    saved_lora(tmp_path / "a")
    done = fs.convert(tmp_path / "a", tmp_path / "b", "lora", energy=energy)
    for name, delta in updates(bert(), tmp_path / "a").items():
        kept = torch.linalg.svdvals(delta).square().cumsum(0)
        assert done.ranks[name] == int((kept < energy * kept[5] * (1 - 1e-6)).sum()) + 1
        assert 1 - done.errors[name] ** 2 >= energy - 1e-6


def test_strength_gate_and_exact_start_are_in_the_result(tmp_path):
    model = bert()
    adapter = fs.adapt(model, fs.LoRA(rank=3), TARGETS, exact_start=True)
    for delta in adapter.deltas.values():
        delta.keep_start()
        delta.set_gate(torch.tensor([1.0, 0.0, 0.5]))
    stir(adapter.parameters())
    adapter.scale = 0.5
    wanted = logits(model)
    adapter.save(tmp_path / "a")
    fs.convert(tmp_path / "a", tmp_path / "b", "lora")
    other = bert()
    assert fs.load(other, tmp_path / "b").scale == 1.0
    assert relative(logits(other), wanted) < 1e-5


def test_an_adapter_at_both_uses_of_a_tied_weight_stays_so(tmp_path):
    model = gpt2()
    adapter = fs.adapt(model, fs.LoRA(rank=4), ("lm_head",), tie="both")
    stir(adapter.parameters())
    wanted = logits(model)
    adapter.save(tmp_path / "a")
    fs.convert(tmp_path / "a", tmp_path / "b", "lora")
    other = gpt2()
    fs.load(other, tmp_path / "b")
    assert relative(logits(other), wanted) < 1e-5


# --- to an LSR -----------------------------------------------------------------------------------
def test_an_lsr_comes_back_from_its_lora(tmp_path):
    model = bert()
    adapter = fresh(model, fs.LSR(rank=4, separation_rank=4), TARGETS)
    adapter.save(tmp_path / "a")
    fs.convert(tmp_path / "a", tmp_path / "lora", "lora")
    whole = fs.LSR(rank=4, separation_rank=16)
    done = fs.convert(tmp_path / "lora", tmp_path / "b", whole)
    assert done.error < 1e-6
    other = bert()
    fs.load(other, tmp_path / "b")
    assert relative(logits(other), logits(model)) < 1e-5


def test_the_error_told_is_that_of_what_was_written_and_refining_lowers_it(tmp_path):
    saved_lora(tmp_path / "a", rank=4)
    plain = fs.convert(tmp_path / "a", tmp_path / "b", fs.LSR(rank=4, separation_rank=2))
    fine = fs.convert(tmp_path / "a", tmp_path / "c", fs.LSR(rank=4, separation_rank=2), refine=30)
    exact, written = updates(bert(), tmp_path / "a"), updates(bert(), tmp_path / "b")
    for name in exact:
        assert plain.errors[name] == pytest.approx(
            float(relative(written[name], exact[name])), rel=1e-4
        )
        assert fine.errors[name] < plain.errors[name]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(0, 5))
def test_the_prediction_is_close_on_random_updates(terms, seed):
    g = torch.Generator().manual_seed(seed)
    M = LowRank(torch.randn(4, 96, generator=g), torch.randn(96, 4, generator=g))
    from finespun.linalg import nearest_separable

    shape = (2, 2), (8, 12), (12, 8), (terms, terms)
    true = nearest_separable(M, *shape).error
    assert predicted_error(M, *shape) == pytest.approx(true, abs=0.06)


def test_the_prediction_counts_a_cut_rank():
    A, B = torch.eye(8)[:4], torch.eye(8)[:, :4] * torch.tensor([4.0, 2.0, 1.0, 0.5])
    M = LowRank(A, B)
    found = predicted_error(M, (1, 2), (2, 4), (2, 4), (8, 8))
    assert found == pytest.approx(M.error(2), abs=1e-6)


def test_too_large_an_error_is_refused_and_nothing_is_written(tmp_path):
    saved_lora(tmp_path / "a")
    with pytest.raises(InputError, match=r"4 of 4 layers .*predicted .* Nothing was written"):
        fs.convert(tmp_path / "a", tmp_path / "b", fs.LSR(rank=4, separation_rank=1), max_error=0.1)
    with pytest.raises(InputError, match="try a larger rank"):
        fs.convert(tmp_path / "a", tmp_path / "b", fs.LoRA(rank=1), max_error=0.1)
    assert not (tmp_path / "b").exists()


# --- to any other --------------------------------------------------------------------------------
def into(case: Case) -> bool:
    """What a weight of 24 x 24 can be converted to."""
    known = fs.STRUCTURES.get(case.structure.kind) is type(case.structure)
    return known and not case.block and not case.exact_start and case.name != "tokens"


@every(into)
def test_any_structure_takes_over_what_it_can_say(tmp_path, case):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    saved_lora(tmp_path / "a", rank=2)
    structure = case.structure
    if structure.needs:
        return
    done = fs.convert(tmp_path / "a", tmp_path / "b", structure, model=tmp_path / "base")
    assert done.structure == structure
    exact = updates(bert(), tmp_path / "a")
    adapter = fs.load(bert(), tmp_path / "b")
    for name, delta in adapter.deltas.items():
        written = delta.dense(delta.base_weight()).detach()
        assert done.errors[name] == pytest.approx(relative(written, exact[name]), abs=1e-4)
    assert done.error <= 1 + 1e-5
    assert done.after == structure.total_parameters(adapter.attached.plan)


@pytest.mark.parametrize("kind", ["unilora", "krona", "vera"])
def test_a_structures_own_updates_come_back(tmp_path, kind):
    structure = fs.make(kind, **FACTORS.get(kind, {}))
    fresh(bert(), structure, TARGETS).save(tmp_path / "a")
    fs.convert(tmp_path / "a", tmp_path / "lora", fs.LoRA(rank=24))
    back = fs.convert(tmp_path / "lora", tmp_path / "b", structure)
    assert back.error < 2e-2


# --- PEFT's folders ------------------------------------------------------------------------------
def by_peft(folder: Path) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=["query", "value"], task_type="SEQ_CLS",
        rank_pattern={"layer.0.attention.self.query": 2},
    )  # fmt: skip
    theirs = peft.get_peft_model(bert(), config).eval()
    stir([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("format", ["native", "peft"])
def test_a_folder_of_pefts_is_squeezed(tmp_path, format):
    theirs = by_peft(tmp_path / "a")
    done = fs.convert(tmp_path / "a", tmp_path / "b", "lora", format=format)
    assert done.error < 1e-6
    model = bert()
    with pytest.warns(UserWarning, match="no fingerprint"):
        fs.load(model, tmp_path / "b")
    assert relative(logits(model), logits(theirs)) < 1e-5
    if format == "peft":
        assert relative(logits(in_peft(bert(), tmp_path / "b")), logits(theirs)) < 1e-5
    again = files.read_adapter(tmp_path / "b")
    parent = files.read_adapter(tmp_path / "a")
    assert again.state.lineage.parents == (files.Parent("a", parent.sha256),)
    assert again.state.base is None
    assert again.state.trained == ("classifier",)


def test_our_own_folder_as_pefts_keeps_its_base(tmp_path):
    saved_lora(tmp_path / "a")
    fs.convert(tmp_path / "a", tmp_path / "b", fs.LoRA(rank=2), format="peft")
    first, second = (files.read_adapter(tmp_path / n) for n in "ab")
    assert second.state.base == first.state.base
    assert second.state.lineage.parents == (files.Parent("mine", first.sha256),)
    assert second.state.lineage.metrics["conversion_error"] > 0.1


# --- updates that depend on the base -------------------------------------------------------------
@pytest.mark.parametrize("kind", ["dora", "hira"])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_the_base_is_read_tensor_by_tensor_where_it_is_needed(tmp_path, kind, make):
    model = make()
    targets = TARGETS if make is bert else ("c_attn", "c_proj")
    make().save_pretrained(tmp_path / "base")
    adapter = fresh(model, fs.make(kind, rank=2), targets)
    wanted = logits(model)
    adapter.save(tmp_path / "a")
    with pytest.raises(InputError, match=r"depends on the base weight.*--model"):
        fs.convert(tmp_path / "a", tmp_path / "b", fs.LoRA(rank=24))
    done = fs.convert(tmp_path / "a", tmp_path / "b", fs.LoRA(rank=24), model=tmp_path / "base")
    assert done.error < 1e-5
    other = make()
    fs.load(other, tmp_path / "b")
    assert relative(logits(other), wanted) < 1e-5
    with pytest.raises(InputError, match=r"no factors .* rank=16 or energy=0.95"):
        fs.convert(tmp_path / "a", tmp_path / "c", "lora", model=tmp_path / "base")


def test_names_with_another_prefix_are_found(tmp_path):
    bert().bert.save_pretrained(tmp_path / "base")
    fresh(bert(), fs.make("dora", rank=2), TARGETS).save(tmp_path / "a")
    done = fs.convert(tmp_path / "a", tmp_path / "b", fs.LoRA(rank=24), model=tmp_path / "base")
    assert done.error < 1e-5


def test_another_base_is_refused_by_shape_and_name(tmp_path):
    fresh(bert(), fs.make("dora", rank=2), TARGETS).save(tmp_path / "a")
    gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(FileError, match=r"gpt2 has no tensor 'bert.encoder.layer.0"):
        fs.convert(tmp_path / "a", tmp_path / "b", fs.LoRA(rank=2), model=tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="holds no weights"):
        StoredWeights(tmp_path / "empty")


# --- what cannot be ------------------------------------------------------------------------------
def test_what_cannot_be_converted_is_told(tmp_path):
    saved_lora(tmp_path / "a")
    convert = fs.convert
    with pytest.raises(InputError, match="is the adapter itself"):
        convert(tmp_path / "a", tmp_path / "a", "lora")
    with pytest.raises(InputError, match=r"a lor2c goes around blocks.*nearest: 'lora'"):
        convert(tmp_path / "a", tmp_path / "b", "lor2c")
    with pytest.raises(InputError, match=r"by gradients of a model.*with mask='snip'; try mask='"):
        convert(tmp_path / "a", tmp_path / "b", fs.make("shira", mask="snip"))
    with pytest.raises(InputError, match=r"depends on the base weight.*--model"):
        convert(tmp_path / "a", tmp_path / "b", "dora")
    with pytest.raises(InputError, match="nearest: 'lora'"):
        convert(tmp_path / "a", tmp_path / "b", "lra")
    with pytest.raises(InputError, match="written here from a LoRA, not a lsr"):
        convert(tmp_path / "a", tmp_path / "b", "lsr", format="peft")
    with pytest.raises(InputError, match="energy chooses ranks"):
        convert(tmp_path / "a", tmp_path / "b", "lsr", energy=0.5)
    with pytest.raises(InputError, match=r"max_error=1\.5"):
        convert(tmp_path / "a", tmp_path / "b", "lora", max_error=1.5)
    convert(tmp_path / "a", tmp_path / "p", "lora", format="peft")
    with pytest.raises(InputError, match="in PEFT's format, which stays"):
        convert(tmp_path / "a", tmp_path / "p", "lora")
    fresh(bert(), fs.LoRA(), (), train_modules=("classifier",)).save(tmp_path / "head")
    with pytest.raises(InputError, match="nothing to convert"):
        convert(tmp_path / "head", tmp_path / "b", "lora")
    fresh(bert(), fs.make("ia3"), TARGETS).save(tmp_path / "ia3")
    base = bert()
    nn.init.ones_(base.bert.encoder.layer[0].attention.self.query.bias)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="moves the bias"):
        convert(tmp_path / "ia3", tmp_path / "b", fs.LoRA(rank=24), model=tmp_path / "base")


def test_damaged_tensors_are_told(tmp_path):
    by_peft(tmp_path / "a")
    saved = files.read_adapter(tmp_path / "a")
    tensors = dict(saved.state.tensors)
    key = next(k for k in tensors if k.name == "A")
    del tensors[key]
    with pytest.raises(FileError, match=r"Missing key.*A"):
        list(Deltas(saved.state.with_tensors(tensors)).values())
    edit(tmp_path / "a", lora_bias=True)
    with pytest.raises(FileError, match="lora_bias"):
        fs.convert(tmp_path / "a", tmp_path / "b", "lora")
