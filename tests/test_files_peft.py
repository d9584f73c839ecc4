"""PEFT's LoRA folders: ours load in PEFT, PEFT's load in ours, with equal outputs."""

import copy
import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from suite import Net, batch, every, net, relative, stir, stirred
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import finespun as fs
from finespun import files
from finespun.errors import BaseMismatch, FileError, InputError, TargetError
from finespun.files.peft import PASSED, REFUSED, USED

PREFIX = "base_model.model."


def bert(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36,
            vocab_size=50, num_labels=3, initializer_range=0.3,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50)).eval()


WORDS = torch.arange(14).view(2, 7)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=WORDS).logits


def in_peft(model: nn.Module, folder: Path) -> nn.Module:
    """The folder loaded by PEFT, which has nothing to say against it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(model, folder).eval()


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder: Path, **changes) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config(folder), **changes}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def fresh(model: nn.Module, structure, targets, name="mine", **kwargs) -> fs.Adapter:
    adapter = fs.adapt(model, structure, targets, name=name, **kwargs)
    stir(adapter.parameters())
    return adapter


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
    fresh(model, Bypass(rank=2), r"blocks\.\d", train=(), name="around")
    fresh(model, IA3(), r"blocks\.\d\.up", train=(), name="bias")
    with pytest.raises(InputError, match=r"'blocks.0' is a block"):
        files.export(model, "around", tmp_path / "x")
    with pytest.raises(InputError, match=r"moves the bias of 'blocks.0.up'"):
        files.export(model, "bias", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_other_consumers_compute_the_same_from_one_file(tmp_path):
    """vLLM reads one alpha / r for all; llama.cpp alpha over the tensor's own rank; diffusers takes
    alpha for the rank where no alpha lies in the file."""
    model = net()
    adapter = fresh(model, fs.LoRA(rank=5, alpha=3.0), r"blocks\.\d\.(up|down)", train=())
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


def test_padding_with_zeros_changes_nothing(tmp_path):
    model = net()
    adapter = fresh(model, fs.LoRA(rank=2), r"blocks\.\d\.up", train=())
    adapter.export(tmp_path / "2")
    adapter.export(tmp_path / "6", rank=6)
    small, large = in_peft(net(), tmp_path / "2"), in_peft(net(), tmp_path / "6")
    assert config(tmp_path / "6")["r"] == 6
    assert relative(large(batch()), small(batch())) < 1e-7


def test_gpt2_and_parts_of_its_fused_projection(tmp_path):
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
    adapter = fresh(net(), fs.LoRA(rank=5), r"blocks\.\d\.up", train=())
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
    adapter = fresh(net(), fs.LoRA(rank=5), r"blocks\.\d\.up", train=())
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

    adapter = fresh(net(), HiRA(rank=2), r"blocks\.\d\.up", train=())
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
    adapter.entry.copies["classifier"].load_state_dict(bert().classifier.state_dict())
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
    adapter = fresh(model, fs.LoRA(rank=2), ("blocks.0.up",), train=("head",))
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
    fresh(model, fs.LoRA(rank=2), "q", train=()).export(tmp_path / "x")
    assert config(tmp_path / "x")["target_modules"] == "q"
    theirs = in_peft(copy.deepcopy(base), tmp_path / "x")
    assert relative(theirs(batch()), model(batch())) < 1e-6


# --- written by PEFT, read by us ---------------------------------------------------------------
def by_peft(folder: Path, model: nn.Module, **options) -> nn.Module:
    """A PEFT model with stirred numbers, saved in `folder`."""
    theirs = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    stir([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(folder)
    return theirs


OPTIONS = {
    "plain": {},
    "alpha": {"r": 4, "lora_alpha": 13},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "ranks": {"r": 4, "rank_pattern": {"layer.0.attention.self.query": 2, r"layer\.\d+.*value": 3}},
    "alphas": {"alpha_pattern": {"query": 5, "layer.1.attention.self.value": 7}},
    "anchored": {"rank_pattern": {"^bert.encoder.layer.1.attention.self.query": 1, "uery": 7}},
    "both, rslora": {
        "use_rslora": True,
        "rank_pattern": {"query": 2},
        "alpha_pattern": {"query": 9},
    },
    "first wins": {"rank_pattern": {"self.query": 2, "query": 3}},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "all": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_we_compute_what_peft_does(tmp_path, name, task):
    options = {"target_modules": ["query", "value"], "task_type": task, **OPTIONS[name]}
    theirs = by_peft(tmp_path / "x", bert(), **options)
    model = bert()
    with pytest.warns(UserWarning, match="carries no fingerprint"):
        adapter = fs.load(model, tmp_path / "x")
    assert relative(logits(model), logits(theirs)) < 1e-6
    assert relative(logits(bert()), logits(theirs)) > 1e-3
    assert adapter.name == "x"
    assert adapter.entry.trained == (("classifier",) if task else ())
    for site, delta in adapter.deltas.items():
        layer = theirs.base_model.model.get_submodule(site)
        assert delta.scale == pytest.approx(layer.scaling["default"])
    with adapter.disabled():
        assert torch.equal(logits(model), logits(bert()))
    adapter.save(tmp_path / "native")
    adapter.export(tmp_path / "again")
    for place in ("native", "again"):
        other = bert()
        fs.load(other, tmp_path / place)
        assert relative(logits(other), logits(theirs)) < 1e-6


@settings(max_examples=25, deadline=None)
@given(
    path=st.from_regex(r"\A[ab]{1,2}(\.[ab]{1,2}){0,3}\Z"),
    keys=st.lists(st.sampled_from(
        ["a", "b", "ab", "a.b", r"a\.b", "^a", "^b.a", ".*a", "[ab]", "(a|b).a", "b+", "a$"]
    ), max_size=4, unique=True),
)  # fmt: skip
def test_patterns_mean_what_they_mean_to_peft(path, keys):
    from peft.utils.other import get_pattern_key

    patterns = {key: i for i, key in enumerate(keys)}
    wanted = patterns.get(get_pattern_key(patterns.keys(), path), -1)
    assert [*files.peft._matching(patterns, path), -1][0] == wanted


def test_patterns_that_differ_on_alpha_are_told(tmp_path):
    options = {"target_modules": ["query"], "alpha_pattern": {"query": 4, "ry": 2, "0.*query": 16}}
    by_peft(tmp_path / "x", bert(), **options)
    model = bert()
    with pytest.warns(UserWarning, match=r"0.attention.self.query' \[16, 4\]: 16 is taken"):
        fs.load(model, tmp_path / "x")
    assert relative(logits(model), logits(in_peft(bert(), tmp_path / "x"))) < 1e-6


def test_a_conv1d_folder_of_pefts(tmp_path):
    theirs = by_peft(tmp_path / "x", gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    model = gpt2()
    with pytest.warns(UserWarning, match="carries no fingerprint"):
        fs.load(model, tmp_path / "x")
    assert relative(logits(model), logits(theirs)) < 1e-6


def test_a_second_adapter_lies_in_a_folder_below(tmp_path):
    theirs = by_peft(tmp_path / "x", bert(), target_modules=["query"])
    theirs.add_adapter("other", peft.LoraConfig(target_modules=["key"]))
    theirs.save_pretrained(tmp_path / "y", selected_adapters=["other"])
    with pytest.raises(FileError, match=r"its folders other do"):
        fs.load(bert(), tmp_path / "y")
    with pytest.warns(UserWarning, match="carries no fingerprint"):
        adapter = fs.load(bert(), tmp_path / "y" / "other")
    assert adapter.name == "other"


def test_our_own_exports_know_their_base_and_makers(tmp_path):
    adapter = fresh(bert(), fs.LSR(rank=4), ("query",))
    adapter.export(tmp_path / "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fs.load(bert(), tmp_path / "x")
    assert again.name == "mine"
    assert again.lineage.method == "lsr"
    with pytest.raises(BaseMismatch):
        fs.load(bert(seed=1), tmp_path / "x")
    in_peft(bert(), tmp_path / "x").save_pretrained(tmp_path / "x")
    save_file({k: 2 * v for k, v in weights(tmp_path / "x").items()},
              tmp_path / "x" / "adapter_model.safetensors")  # fmt: skip
    with pytest.warns(UserWarning, match="was written with other tensors"):
        assert fs.load(bert(), tmp_path / "x").lineage is None


REFUSALS = {
    "use_dora": ({"use_dora": True}, "use_dora=True"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True"),
    "bias": ({"bias": "all"}, "bias=all"),
    "several": ({"bias": "all", "use_qalora": True}, "use_qalora=True, bias=all"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication="),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices="),
    "type": ({"peft_type": "LOHA"}, "'LOHA'; only 'LORA'"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
    "unknown": ({"use_drora": True}, "use_drora=True is unknown; nearest: 'use_dora'"),
    "rank": ({"r": 3}, "while the config gives it rank 3"),
    "no rank": ({"r": 0}, "rank=0"),
    "text": ({"r": "8"}, "is damaged: TypeError"),
    "alpha": ({"lora_alpha": "big"}, "is damaged: ValueError"),
    "pattern": ({"rank_pattern": {"(": 2}}, "'(' is no regular expression"),
    "patterns": ({"rank_pattern": [1]}, "is damaged: AttributeError"),
    "saved": ({"modules_to_save": "classifier"}, "must be a list of names"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_configs_that_are_not_read_are_refused_by_name(tmp_path, name):
    by_peft(tmp_path / "x", bert(), target_modules=["query"])
    changes, message = REFUSALS[name]
    edit(tmp_path / "x", **changes)
    model = bert()
    with pytest.raises(FileError) as caught:
        fs.load(model, tmp_path / "x")
    assert message in str(caught.value)
    assert "_finespun_board" not in model.__dict__


QUERY = f"{PREFIX}bert.encoder.layer.0.attention.self.query.lora_"
TENSORS = {
    "missing": (lambda t: t.pop(QUERY + "B.weight"), "query.lora_B.weight' is missing"),
    "unknown": (lambda t: t.update({PREFIX + "x.weight": torch.ones(1)}), "neither lora_A nor"),
    "prefix": (lambda t: t.update({"x.lora_A.weight": torch.ones(1)}), "does not begin with"),
    "DoRA": (
        lambda t: t.update({QUERY + "magnitude_vector": torch.ones(24)}), "DoRA's magnitudes"),
    "bias": (lambda t: t.update({QUERY + "B.bias": torch.ones(24)}), "a bias on lora_B"),
    "embedding": (
        lambda t: t.update({PREFIX + "x.lora_embedding_A": torch.ones(2)}), "on an embedding"),
    "convolution": (
        lambda t: t.update({QUERY + "A.weight": torch.ones(8, 24, 1, 1)}), "only linear layers"),
    "shape": (lambda t: t.update({QUERY + "A.weight": torch.ones(7, 24)}), "gives it rank 8"),
    "turned": (lambda t: t.update({QUERY + "A.weight": torch.ones(24, 8)}), "gives it rank 8"),
    "NaN": (
        lambda t: t.update({QUERY + "A.weight": torch.full((8, 24), float("nan"))}), "192 of 192"),
    "none": (lambda t: t.clear(), "there is no lora_A"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_belong_are_refused_by_key(tmp_path, name):
    by_peft(tmp_path / "x", bert(), target_modules=["query"])
    change, message = TENSORS[name]
    held = weights(tmp_path / "x")
    change(held)
    save_file(held, tmp_path / "x" / "adapter_model.safetensors")
    with pytest.raises(FileError) as caught:
        fs.load(bert(), tmp_path / "x")
    assert message in str(caught.value)


def test_a_folder_for_another_model_is_refused(tmp_path):
    by_peft(tmp_path / "x", bert(), target_modules=["query"])
    with pytest.raises(TargetError, match="no module is called"):
        fs.load(net(), tmp_path / "x")
    wide = bert()
    wide.bert.encoder.layer[0].attention.self.query = nn.Linear(25, 24)
    with pytest.raises(InputError, match="24x24"):
        fs.load(wide, tmp_path / "x")


def test_pickles_are_not_opened(tmp_path):
    theirs = by_peft(tmp_path / "x", bert(), target_modules=["query"])
    (tmp_path / "x" / "adapter_model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "x" / "adapter_model.bin")
    with pytest.raises(FileError, match=r"adapter_model.bin, which is pickled and not opened"):
        fs.load(bert(), tmp_path / "x")
    (tmp_path / "x" / "adapter_model.bin").rename(tmp_path / "x" / "adapter_model.safetensors")
    with pytest.raises(FileError, match=r"truncated or no safetensors"):
        fs.load(bert(), tmp_path / "x")


def test_lenient_reading_passes_over_an_unknown_key(tmp_path):
    theirs = by_peft(tmp_path / "x", bert(), target_modules=["query"])
    edit(tmp_path / "x", from_the_future=True)
    model = bert()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fs.load(model, tmp_path / "x", strict=False)
    assert any("from_the_future" in str(w.message) for w in caught)
    assert relative(logits(model), logits(theirs)) < 1e-6


def test_every_key_of_pefts_config_is_known_to_us():
    keys = {k for k in peft.LoraConfig().to_dict() if not k.startswith("_")}
    assert keys <= {*USED, *PASSED, *REFUSED}
