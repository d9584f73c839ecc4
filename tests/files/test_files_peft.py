"""LoRA folders written by PEFT: we compute from them what PEFT does."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_folders import PREFIX, bert, edit, fresh, gpt2, in_peft, logits, weights
from safetensors.torch import save_file
from suite import net, relative, stir
from torch import nn

import finespun as fs
from finespun.errors import BaseMismatch, FileError, InputError, StrictError, TargetError
from finespun.files import lora
from finespun.files.lora import PASSED, REFUSED, USED


# --- written by PEFT, read by us ---------------------------------------------------------------
def by_peft(folder: Path, model: nn.Module, **options) -> nn.Module:
    """A PEFT model with stirred parameters, saved in `folder`."""
    import peft

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
    assert adapter.attached.trained == (("classifier",) if task else ())
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
    assert [*lora._matching(patterns, path), -1][0] == wanted


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
    import peft

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
    "use_dora": ({"use_dora": True}, "query.lora_magnitude_vector' is missing"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True"),
    "bias": ({"bias": "some"}, "bias=some"),
    "several": ({"bias": "some", "use_qalora": True}, "use_qalora=True, bias=some"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication="),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices=[1], and no such rows"),
    "parameters": ({"target_parameters": ["experts.up"]}, "target_parameters=['experts.up']"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens=[1, 2]"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config="),
    "tied": ({"ensure_weight_tying": True}, "ensure_weight_tying=True"),
    "type": ({"peft_type": "XLORA"}, "peft_type is 'XLORA'"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' changes the base"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changes the base"),
    "pissa": (
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights='pissa_niter_4' changes the base's own weights when PEFT loads it; "
        "save it from PEFT with path_initial_model_for_weight_conversion",
    ),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
    "unknown": ({"use_drora": True}, "use_drora=True is unknown; nearest: 'use_dora'"),
    "rank": ({"r": 3}, "while the config gives it rank 3"),
    "no rank": ({"r": 0}, "rank=0"),
    "text": ({"r": "8"}, "rank='8' must be a whole number"),
    "alpha": ({"lora_alpha": "big"}, "lora_alpha must be a finite number, got 'big'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha must be a finite number, got 'None'"),
    "no dropout": ({"lora_dropout": None}, "lora_dropout must be a finite number"),
    "no alpha of a layer": ({"alpha_pattern": {"query": None}}, "query': alpha must be a finite"),
    "pattern": ({"rank_pattern": {"(": 2}}, "'(' is no regular expression"),
    "patterns": (
        {"rank_pattern": [1]},
        "rank_pattern must be a table of expressions and numbers, as {'q_proj': 4}, got [1]",
    ),
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
    assert "_finespun_adapters" not in model.__dict__


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_held_is_refused_by_its_key(tmp_path, key):
    by_peft(tmp_path / "x", bert(), target_modules=["query"])
    edit(tmp_path / "x", **{key: {"some": "value"}})
    with pytest.raises(FileError, match=rf"not read: {key}=.*merge it in PEFT, or save it without"):
        fs.load(bert(), tmp_path / "x", strict=False)


QUERY = f"{PREFIX}bert.encoder.layer.0.attention.self.query.lora_"
TENSORS = {
    "missing": (lambda t: t.pop(QUERY + "B.weight"), "query.lora_B.weight' is missing"),
    "unknown": (lambda t: t.update({PREFIX + "x.weight": torch.ones(1)}), "neither lora_A nor"),
    "prefix": (lambda t: t.update({"x.lora_A.weight": torch.ones(1)}), "does not begin with"),
    "DoRA": (
        lambda t: t.update({QUERY + "magnitude_vector": torch.ones(24)}),
        "magnitude_vector' is there although use_dora is false"),
    "bias": (lambda t: t.update({QUERY + "B.bias": torch.ones(24)}), "a bias on lora_B"),
    "embedding": (
        lambda t: t.update({PREFIX + "x.lora_embedding_A": torch.ones(2)}), "no factor of a LoRA"),
    "a table's": (
        lambda t: t.update({PREFIX + "x.lora_embedding_A": torch.ones(2, 5)}),
        "x.lora_embedding_B' is missing"),
    "rows": (
        lambda t: t.update({PREFIX + "x.token_adapter.trainable_tokens_delta": torch.ones(2, 5)}),
        "'x' has 2 trained rows, the config names none"),
    "bias of a layer": (lambda t: t.update({PREFIX + "x.bias": torch.ones(2)}), "neither lora_A"),
    "convolution": (
        lambda t: t.update({QUERY + "A.weight": torch.ones(8, 24, 1, 1)}),
        "'s, its other factor a "),
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
    with pytest.raises(StrictError, match="from_the_future=True is unknown") as caught:
        fs.load(model, tmp_path / "x")
    assert caught.value.__notes__ == ["strict=False skips it"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fs.load(model, tmp_path / "x", strict=False)
    assert any("from_the_future" in str(w.message) for w in caught)
    assert relative(logits(model), logits(theirs)) < 1e-6


def test_every_key_of_pefts_config_is_known_to_us():
    import peft

    keys = {k for k in peft.LoraConfig().to_dict() if not k.startswith("_")}
    assert keys <= {*USED, *PASSED, *REFUSED}
