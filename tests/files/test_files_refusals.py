"""Finespun's own format: what does not belong is refused, by name, and nothing changes."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from suite import batch, bytes_of, net, same
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.errors import (
    BaseMismatch,
    FileError,
    InputError,
    PlanError,
    StrictError,
    TargetError,
)
from finespun.lifecycle.conversion.facts import compare
from finespun.storage import safe_io

LORA, TARGETS = fs.LoRA(rank=2), r"blocks\.\d\.up"


@pytest.fixture
def saved(tmp_path):
    """A folder with a stirred LoRA and a head of its own, and the output it gave."""
    model = net()
    adapter = fs.adapt(model, LORA, TARGETS, ("head",), "first")
    for p in adapter.parameters():
        p.data.add_(torch.randn_like(p))
    adapter.save(tmp_path / "a")
    return tmp_path / "a", model(batch())


def rewrite(folder: Path, edit) -> None:
    """Change adapter.json; the file of tensors keeps its digest."""
    path = folder / "adapter.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def retensor(folder: Path, edit) -> None:
    """Change the tensors, and the digest with them."""
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    rewrite(folder, lambda c: c.update(sha256=safe_io.read_tensors(path, False).sha256))


def drop(key):
    return lambda t: t.pop(key)


def put(key, value):
    return lambda t: t.update({key: value})


A0, B1 = "delta/blocks.0.up/A", "delta/blocks.1.up/B"
ILL = {
    "missing": (drop(A0), f"'{A0}' is missing"),
    "extra": (put("delta/blocks.0.up/C", torch.ones(1)), "'delta/blocks.0.up/C' belongs to noth"),
    "another site": (put("delta/blocks.7.up/A", torch.ones(2, 24)), "blocks.7.up/A' belongs to"),
    "no place": (put("A", torch.ones(2, 24)), "'A' belongs to nothing"),
    "shape": (put(A0, torch.ones(3, 24)), f"'{A0}' is (3, 24), expected (2, 24)"),
    "turned": (put(B1, torch.ones(2, 40)), f"'{B1}' is (2, 40), expected (40, 2)"),
    "integers": (put(A0, torch.ones(2, 24, dtype=torch.int32)), f"'{A0}' is torch.int32"),
    "head": (put("trained/head/weight", torch.ones(7, 24)), "(7, 24), expected (5, 24)"),
    "no bias": (drop("trained/head/bias"), "'trained/head/bias' is missing"),
    "gate": (put("delta/blocks.0.up/gate", torch.ones(3)), "gate' is (3,), expected (2,)"),
    "mask": (put("delta/blocks.0.up/alive_A", torch.ones(2, 24)), "alive_A' is torch.float32"),
    "half a start": (put("delta/blocks.0.up/start.A", torch.ones(2, 24)), "start.B' is missing"),
    "mask of nothing": (put("delta/blocks.0.up/alive_C", torch.ones(2)), "alive_C' belongs to"),
    "NaN": (put(A0, torch.full((2, 24), float("nan"))), f"'{A0}' holds 48 of 48"),
}


@pytest.mark.parametrize("name", ILL)
def test_ill_tensors_are_named_and_the_model_is_untouched(saved, name):
    edit, message = ILL[name]
    retensor(saved[0], edit)
    model = net()
    with pytest.raises(FileError) as caught:
        fs.load(model, saved[0])
    assert message in str(caught.value)
    assert same(bytes_of(model), bytes_of(net()))
    assert not [k for k in model.__dict__ if "finespun" in k]


def test_all_problems_are_named_at_once(saved):
    retensor(saved[0], lambda t: [drop(A0)(t), put(B1, torch.ones(1))(t), put("x", B(2))(t)])
    with pytest.raises(FileError) as caught:
        fs.load(net(), saved[0])
    assert all(f"'{key}'" in str(caught.value) for key in (A0, B1, "x"))


def B(n):
    return torch.ones(n)


CONFIGS = {
    "format": (lambda c: c.update(format=2), "format 2; this version reads 1"),
    "no format": (lambda c: c.pop("format"), "format None"),
    "unknown key": (lambda c: c.update(strenght=1.0), "'strenght' is unknown; nearest: 'strength'"),
    "missing key": (lambda c: c.pop("trained"), "'trained' is missing"),
    "kind": (lambda c: c["structure"].update(kind="lorra"), "'lorra'; nearest: 'lora'"),
    "kind of a list": (lambda c: c["structure"].update(kind=["lora"]), "structure.kind must be t"),
    "option": (lambda c: c["structure"]["options"].update(rnk=1), "no option 'rnk'; nearest: 'ra"),
    "bad option": (lambda c: c["structure"]["options"].update(rank=0), "rank=0 must be at least 1"),
    "text option": (lambda c: c["structure"]["options"].update(rank="2"), "must be a whole number"),
    "name": (lambda c: c.update(name=3), "name must be text"),
    "strength": (lambda c: c.update(strength="big"), "strength must be a finite number"),
    "nothing": (
        lambda c: c.update(plan={"sites": [], "choices": {}, "shared": {}}, trained=[]),
        "neither a site nor a trained module",
    ),
    "site twice": (
        lambda c: c["plan"]["sites"].append(c["plan"]["sites"][0]),
        "must name no site twice",
    ),
    "short site": (lambda c: c["plan"]["sites"][0].pop(), "plan.sites must be a list of 4"),
    "size": (lambda c: c["plan"]["sites"][0].__setitem__(1, -1), "has a size of -1"),
    "choice": (lambda c: c["plan"]["choices"].update(x={}), "names 'x', no site"),
    "choices": (lambda c: c["plan"].update(choices=[]), "plan.choices must be an object"),
    "no choice": (lambda c: c["plan"].update(choices={}), "the plan has no site 'blocks.0.up'"),
    "bad rank": (lambda c: c["plan"]["choices"]["blocks.0.up"].update(rank=-1), "cannot be built"),
    "base": (lambda c: c["base"].pop("shapes"), "base.shapes is missing"),
    "base key": (lambda c: c["base"].update(shape=1), "base.shape is unknown; nearest: 'shapes'"),
    "samples": (lambda c: c["base"].update(samples={"a": 1}), "base is damaged"),
    "sample dtype": (
        lambda c: c["base"].update(samples={"a": {"dtype": "nn", "values": []}}),
        "base is damaged",
    ),
    "lineage": (lambda c: c["lineage"].update(who="me"), "lineage has no 'who'"),
    "parents": (lambda c: c["lineage"].update(parents=[{"x": 1}]), "lineage: "),
    "metrics": (lambda c: c["lineage"].update(metrics=[]), "lineage.metrics must be an object"),
    "digest": (lambda c: c.update(sha256="0" * 64), "not the file that adapter.json was written"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_adapter_json_is_refused_by_key(saved, name):
    edit, message = CONFIGS[name]
    rewrite(saved[0], edit)
    model = net()
    with pytest.raises(FileError) as caught:
        fs.load(model, saved[0])
    assert message in str(caught.value)
    assert not [k for k in model.__dict__ if "finespun" in k]


def test_lenient_reading_passes_over_what_is_unknown_and_says_so(saved):
    rewrite(saved[0], lambda c: c.update(colour="red", sha256="0" * 64))
    rewrite(saved[0], lambda c: c["structure"]["options"].update(shiny=True))
    model = net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fs.load(model, saved[0], strict=False)
    told = " ".join(str(w.message) for w in caught)
    assert all(word in told for word in ("colour", "shiny", "not the file that"))
    assert torch.equal(model(batch()), saved[1])


LENIENT = "strict=False skips it"
UNKNOWN = {
    "key": lambda c: c.update(colour="red"),
    "an option": lambda c: c["structure"]["options"].update(shiny=True),
    "plan": lambda c: c["plan"].update(colour="red"),
    "tensors": lambda c: c.update(sha256="0" * 64),
}


def notes_of(error):
    return getattr(error, "__notes__", [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNKNOWN)
def test_lenience_is_offered_where_it_helps(saved, name):
    rewrite(saved[0], UNKNOWN[name])
    model = net()
    with pytest.raises(StrictError) as caught:
        fs.load(model, saved[0])
    assert notes_of(caught.value) == [LENIENT]
    with pytest.raises(StrictError) as caught:
        compare(saved[0], saved[0])
    assert notes_of(caught.value) == [LENIENT]
    fs.load(model, saved[0], strict=False)
    assert torch.equal(model(batch()), saved[1])


@pytest.mark.parametrize(
    "name", [n for n in CONFIGS if n not in ("digest", "unknown key", "option")]
)
def test_lenience_is_not_offered_where_it_does_not_help(saved, name):
    rewrite(saved[0], CONFIGS[name][0])
    for strict in (True, False):
        with pytest.raises(FileError) as caught:
            fs.load(net(), saved[0], strict=strict)
        assert not notes_of(caught.value)
        assert "strict" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.b", "a:b", "../x"])
def test_a_name_that_cannot_be_is_refused(saved, name):
    rewrite(saved[0], lambda c: c.update(name=name))
    with pytest.raises(InputError, match="must be non-empty and hold none of"):
        fs.load(net(), saved[0])


def test_a_model_without_the_sites_is_told(saved):
    model = nn.Sequential(nn.Linear(24, 5))
    with pytest.raises(TargetError, match=r"no module is called 'blocks.0.up'"):
        fs.load(model, saved[0])
    wider = net()
    wider.blocks[1].up = nn.Linear(24, 41)
    with pytest.raises(PlanError, match=r"blocks.1.up.* 40x24.* 41x24"):
        fs.load(wider, saved[0])
    headless = net()
    del headless.head
    with pytest.raises(TargetError, match="'head' to train"):
        fs.load(headless, saved[0])


def test_another_base_is_refused_unless_forced(saved):
    model = net(seed=9)
    with pytest.raises(BaseMismatch, match=r"Net \(.*this model is Net \(.*force=True"):
        fs.load(model, saved[0])
    assert not [k for k in model.__dict__ if "finespun" in k]
    with pytest.warns(UserWarning, match="made for Net"):
        fs.load(model, saved[0], force=True)
    assert not torch.equal(model(batch()), saved[1])


def test_a_failure_while_activating_leaves_the_model_as_it_was(saved, monkeypatch):
    model = net()
    monkeypatch.setattr(hosts, "activate", lambda *a: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        fs.load(model, saved[0])
    assert same(bytes_of(model), bytes_of(net()))
    assert not [k for k in model.__dict__ if "finespun" in k]


def test_a_folder_of_something_else_is_told(saved, tmp_path):
    with pytest.raises(
        FileError, match=r"holds neither adapter.json nor adapter_config.json; its f"
    ):
        fs.load(net(), saved[0].parent)
    with pytest.raises(FileError, match="is no folder"):
        fs.load(net(), tmp_path / "nowhere")
    (saved[0] / "adapter.safetensors").unlink()
    with pytest.raises(FileError, match=r"adapter.safetensors does not exist"):
        fs.load(net(), saved[0])
