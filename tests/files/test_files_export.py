"""LoRA folders written by us: PEFT and others compute from them what we do."""

import copy
import re

import pytest
import torch
from peft_folders import PREFIX, bert, config, fresh, gpt2, in_peft, logits, weights
from suite import Net, batch, every, net, relative, stirred
from torch import nn

import finespun as fs
from finespun import files
from finespun.errors import InputError


# --- written by us, read by PEFT -------------------------------------------------------------
@pytest.mark.parametrize(
    "targets",
    [
        ("query", "value"), ("layer.0.attention.self.query",), r".*1.*(key|intermediate.dense)",
        "all-linear",
    ],
    ids=["leaves", "one", "pattern", "all"],
)  # fmt: skip
@pytest.mark.parametrize(
    "structure",
    [fs.LoRA(rank=3), fs.LSR(rank=4, separation_rank=3), fs.LSR(rank=4, start="official")],
    ids=["lora", "lsr", "shadow"],
)
def test_peft_computes_what_we_do(tmp_path, structure, targets):
    import peft

    model = bert()
    adapter = fresh(model, structure, targets, exact_start=True)
    adapter.scale = 0.7
    model.eval()
    wanted = logits(model)
    done = adapter.export(tmp_path / "x")
    assert done.error == 0
    assert done.trained == ("classifier",)
    theirs = in_peft(bert(), tmp_path / "x")
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    assert relative(logits(theirs), wanted) < 1e-6
    assert relative(logits(bert()), wanted) > 1e-2
    theirs.save_pretrained(tmp_path / "back")
    here, there = weights(tmp_path / "x"), weights(tmp_path / "back")
    assert {k: v.shape for k, v in here.items()} == {k: v.shape for k, v in there.items()}
    assert all(torch.equal(here[k], there[k]) for k in here)
    assert config(tmp_path / "x").keys() < peft.LoraConfig().to_dict().keys()
    again = bert()
    fs.load(again, tmp_path / "x")
    assert relative(logits(again), wanted) < 1e-6


@every(lambda case: not case.block and not case.name.startswith("ia3"))
def test_every_structure_exports_its_update(case, tmp_path):
    model, adapter = stirred(case)
    dense = {n: d.dense(d.base_weight()).detach() for n, d in adapter.deltas.items()}
    done = adapter.export(tmp_path / "x", rank=24 if case.delta().factors() is None else None)
    assert done.error == 0
    theirs = in_peft(net(), tmp_path / "x")
    for name, wanted in dense.items():
        layer = theirs.base_model.model.get_submodule(name)
        assert relative(layer.get_delta_weight("default"), wanted) < 1e-5
    assert relative(theirs(batch()), model(batch())) < 1e-5


def test_what_no_lora_can_say_is_refused(tmp_path):
    from methods import IA3, Bypass

    model = net()
    fresh(model, Bypass(rank=2), r"blocks\.\d", train_modules=(), name="around")
    fresh(model, IA3(), r"blocks\.\d\.up", train_modules=(), name="bias")
    with pytest.raises(InputError, match=r"'blocks.0' is a block"):
        files.export(model, "around", tmp_path / "x")
    with pytest.raises(InputError, match=r"moves the bias of 'blocks.0.up'"):
        files.export(model, "bias", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_other_consumers_compute_the_same_from_one_file(tmp_path):
    """vLLM reads one alpha / r for all; llama.cpp alpha over the tensor's own rank; diffusers takes
    alpha for the rank where no alpha lies in the file."""
    model = net()
    adapter = fresh(model, fs.LoRA(rank=5, alpha=3.0), r"blocks\.\d\.(up|down)", train_modules=())
    first = adapter.deltas["blocks.0.up"]
    first.switch_off(first.groups("rank")[0])
    first.switch_off(first.groups("rank")[3])
    adapter.compact()
    adapter.scale = -1.5
    adapter.export(tmp_path / "x")
    settings_, held = config(tmp_path / "x"), weights(tmp_path / "x")
    for name, delta in adapter.deltas.items():
        A, B = (held[f"{PREFIX}{name}.lora_{s}.weight"] for s in "AB")
        assert len(A) == settings_["r"] == 5
        scales = {
            "vllm": settings_["lora_alpha"] / settings_["r"],
            "llama.cpp": settings_["lora_alpha"] / len(A),
            "diffusers": B.shape[1] / len(A),
        }
        wanted = -1.5 * delta.dense(delta.base_weight())
        for scale in scales.values():
            assert relative(scale * (B @ A), wanted) < 1e-6
    assert settings_["rank_pattern"] == settings_["alpha_pattern"] == {}
    assert {t.dtype for t in held.values()} == {torch.float32}


@pytest.mark.slow
def test_padding_with_zeros_changes_nothing(tmp_path):
    model = net()
    adapter = fresh(model, fs.LoRA(rank=2), r"blocks\.\d\.up", train_modules=())
    adapter.export(tmp_path / "2")
    adapter.export(tmp_path / "6", rank=6)
    small, large = in_peft(net(), tmp_path / "2"), in_peft(net(), tmp_path / "6")
    assert config(tmp_path / "6")["r"] == 6
    assert relative(large(batch()), small(batch())) < 1e-7


def test_gpt2_and_parts_of_its_fused_projection(tmp_path):
    import peft

    model = gpt2()
    adapter = fresh(model, fs.LoRA(rank=2), ("c_attn:q", "c_attn:v", "mlp.c_proj"))
    wanted = logits(model)
    done = adapter.export(tmp_path / "x")
    assert done.rank == 4
    theirs = in_peft(gpt2(), tmp_path / "x")
    assert isinstance(theirs, peft.PeftModelForCausalLM)
    assert relative(logits(theirs), wanted) < 1e-6
    assert relative(logits(gpt2()), wanted) > 1e-3
    again = gpt2()
    fs.load(again, tmp_path / "x")
    assert relative(logits(again), wanted) < 1e-6


# --- approximation ---------------------------------------------------------------------------
def test_a_smaller_rank_is_the_best_one_and_its_error_is_told(tmp_path):
    adapter = fresh(net(), fs.LoRA(rank=5), r"blocks\.\d\.up", train_modules=())
    with pytest.warns(UserWarning, match=r"relative error up to \d"):
        done = adapter.export(tmp_path / "x", rank=2)
    held = weights(tmp_path / "x")
    for name, delta in adapter.deltas.items():
        dense = delta.dense(delta.base_weight()).detach()
        A, B = (held[f"{PREFIX}{name}.lora_{s}.weight"] for s in "AB")
        U, S, Vh = torch.linalg.svd(dense)
        best = U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]
        assert relative(B @ A, best) < 1e-5
        assert done.errors[name] == pytest.approx(relative(best, dense), rel=1e-4)
    assert done.error == max(done.errors.values())


def test_a_bound_on_the_error_refuses_and_says_what_would_do(tmp_path):
    adapter = fresh(net(), fs.LoRA(rank=5), r"blocks\.\d\.up", train_modules=())
    with pytest.raises(
        InputError, match=r"off by .* more than max_error=0.5; rank=(\d+) keeps it"
    ) as e:
        adapter.export(tmp_path / "x", rank=1, max_error=0.5)
    assert not (tmp_path / "x").exists()
    enough = int(re.search(r"rank=(\d+)", str(e.value))[1])
    with pytest.warns(UserWarning, match="relative error"):
        assert adapter.export(tmp_path / "x", rank=enough, max_error=0.5).error <= 0.5
    with pytest.raises(InputError):
        adapter.export(tmp_path / "x", rank=enough - 1, max_error=0.5)


def test_without_factors_the_smallest_rank_within_the_bound_is_taken(tmp_path):
    from methods import HiRA

    adapter = fresh(net(), HiRA(rank=2), r"blocks\.\d\.up", train_modules=())
    with pytest.warns(UserWarning, match="relative error"):
        done = adapter.export(tmp_path / "x", max_error=0.2)
    assert 1 < done.rank < 24
    assert done.error <= 0.2
    with pytest.raises(InputError):
        adapter.export(tmp_path / "y", rank=done.rank - 1, max_error=0.2)
    with pytest.warns(UserWarning, match="relative error"):
        assert adapter.export(tmp_path / "y").rank == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank=0"), ({"max_error": -0.1}, "max_error"), ({"max_error": 1}, "max_error")],
)
def test_options_out_of_range_are_refused(tmp_path, options, message):
    adapter = fs.adapt(net(), fs.LoRA(rank=2), r"blocks\.\d\.up", ())
    with pytest.raises(InputError, match=message):
        adapter.export(tmp_path / "x", **options)


def test_high_ranks_are_pointed_out(tmp_path):
    adapter = fs.adapt(net(), fs.LoRA(rank=20), r"blocks\.\d\.up", ())
    assert "vLLM serves at most 16" in str(adapter.export(tmp_path / "x"))
    assert "vLLM" not in str(adapter.export(tmp_path / "y", rank=16))


# --- modules trained whole ---------------------------------------------------------------------
def test_a_head_can_be_left_out_and_that_is_said(tmp_path):
    model = bert()
    adapter = fresh(model, fs.LoRA(rank=2), ("query",))
    with pytest.warns(UserWarning, match="classifier left out"):
        done = adapter.export(tmp_path / "x", allow_full=False)
    assert done.dropped == ("classifier",)
    assert config(tmp_path / "x")["modules_to_save"] is None
    assert all(".lora_" in key for key in weights(tmp_path / "x"))
    theirs = in_peft(bert(), tmp_path / "x")
    adapter.attached.copies["classifier"].load_state_dict(bert().classifier.state_dict())
    assert relative(logits(theirs), logits(model.eval())) < 1e-6


class Twins(Net):
    """A head whose name is the end of another module's name."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_head = nn.Linear(24, 24)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.pre_head(x.mean(1)))


def test_a_name_that_ends_another_does_not_take_it_along(tmp_path):
    torch.manual_seed(0)
    base = Twins().eval()
    model = copy.deepcopy(base)
    adapter = fresh(model, fs.LoRA(rank=2), ("blocks.0.up",), train_modules=("head",))
    adapter.export(tmp_path / "x")
    theirs = in_peft(copy.deepcopy(base), tmp_path / "x")
    assert relative(theirs(batch()), model(batch())) < 1e-6
    assert relative(base(batch()), model(batch())) > 1e-3
    again = copy.deepcopy(base)
    fs.load(again, tmp_path / "x")
    assert relative(again(batch()), model(batch())) < 1e-6


class Suffixes(nn.Module):
    """Every name of a target is also the end of another module's name."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(24, 24)
        self.inner = nn.ModuleDict({"q": nn.Linear(24, 24)})

    def forward(self, x):
        return self.inner["q"](torch.tanh(self.q(x)))


def test_targets_that_no_list_can_name_become_a_pattern(tmp_path):
    torch.manual_seed(0)
    base = Suffixes()
    model = copy.deepcopy(base)
    fresh(model, fs.LoRA(rank=2), "q", train_modules=()).export(tmp_path / "x")
    assert config(tmp_path / "x")["target_modules"] == "q"
    theirs = in_peft(copy.deepcopy(base), tmp_path / "x")
    assert relative(theirs(batch()), model(batch())) < 1e-6
