"""What a newcomer types: names in any case, PEFT's words, several adapters, small layers."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from suite import draw, net
from torch import nn

import finespun as fs
from finespun import face
from finespun.errors import InputError, PlanError, StateError, TargetError
from finespun.methods.index import NAMES

KINDS = fs.STRUCTURES
# Those whose bank fixes one rank for all layers, or whose sizes other options set.
REFUSED = {"kadaptation", "nola", "s2_lora", "tera", "tied_lora", "unilora", "vblora"}
OPTIONS_OF_PEFT = {
    "r": ("lora", 4, "rank"),
    "lora_alpha": ("lora", 4, "alpha"),
    "lora_dropout": ("lora", 0.1, "dropout"),
    "use_rslora": ("lora", True, "rslora"),
}


class Small(nn.Module):
    """A wide layer and one that holds rank 4."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.narrow(torch.tanh(self.wide(x)))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_structure_is_found_under_each_of_its_names(kind):
    cls = KINDS[kind]
    for name in (kind, kind.upper(), kind.replace("_", "-"), cls.__name__, cls.title):
        assert fs.make(name) == cls()
    assert getattr(fs, cls.__name__) is cls
    assert getattr(fs, cls.__name__.lower()) is cls
    assert cls.__name__ in dir(fs)


def test_no_two_methods_share_a_name_without_case():
    assert len({name.casefold() for name in NAMES}) == len(NAMES)
    assert not {name.casefold() for name in NAMES} & {name.casefold() for name in fs.__all__} - {
        "lora", "lsr"
    }  # fmt: skip


def test_names_are_found_without_importing_torch():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, finespun as fs; dir(fs); print('torch' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_a_name_is_enough_and_its_options_may_follow():
    adapter = fs.adapt(net(), "LoRA", rank=2)
    assert adapter.structure == fs.LoRA(rank=2)
    assert adapter.deltas.keys() == fs.adapt(net(), fs.LoRA(rank=2), "all-linear").deltas.keys()
    with pytest.raises(InputError, match="nearest: 'lora'"):
        fs.adapt(net(), "loraa")
    with pytest.raises(InputError, match=r"pass one of it: fs\.LSR\(\)"):
        fs.adapt(net(), fs.LSR)


@pytest.mark.parametrize("word", sorted(face.WORDS))
def test_every_argument_of_peft_is_answered(word):
    model = net()
    for structure in ("lora", fs.LoRA()):
        with pytest.raises(InputError, match=f"PEFT's {word}= is .*") as told:
            fs.adapt(model, structure, **{word: None})
        assert face.WORDS[word] in str(told.value)
    assert fs.list_adapters(model) == []


@pytest.mark.parametrize("word", sorted(OPTIONS_OF_PEFT))
def test_an_option_of_peft_is_answered_with_ours(word):
    kind, value, ours = OPTIONS_OF_PEFT[word]
    with pytest.raises(InputError, match=f"it is called '{ours}' here"):
        fs.adapt(net(), kind, **{word: value})
    with pytest.raises(InputError, match=rf"fs\.LoRA\({ours}=...\)"):
        fs.adapt(net(), fs.LoRA(), **{word: value})
    assert getattr(fs.make(kind, **{word: value}), ours) == value


def test_a_config_of_peft_is_answered():
    config = type("LoraConfig", (), {"peft_type": "LORA"})()
    with pytest.raises(InputError, match=r"LoraConfig is PEFT's; ask fs\.adapt\(model, 'lora'"):
        fs.adapt(net(), config)


def test_what_all_linear_leaves_out_is_printed():
    model = nn.Sequential(nn.Embedding(7, 24), nn.Linear(24, 24), nn.LayerNorm(24))
    assert "not adapted: 1 Embedding, 1 LayerNorm" in repr(fs.adapt(model, "lora"))
    assert "not adapted" not in repr(fs.adapt(net(), "lora", ["up"]))


def test_what_looks_like_a_linear_layer_and_is_left_out_is_warned_of():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(24, 2), "b": nn.Linear(24, 24)})
    with pytest.warns(UserWarning, match=r"leaves out .*a\.out_proj.*a\.in_proj_weight"):
        assert list(fs.adapt(model, "lora").deltas) == ["b"]


def ranked(kind):
    cls = KINDS[kind]
    return "rank" in cls.__dataclass_fields__ and cls.site_kind == "linear"


@pytest.mark.parametrize("kind", [kind for kind in sorted(KINDS) if ranked(kind)])
def test_a_layer_too_small_for_the_rank_gets_the_largest_that_it_holds(kind, tmp_path):
    torch.manual_seed(0)
    model, x = Small(), draw(5, 24, seed=1)
    base = model(x)
    rank = 9 if KINDS[kind]().rank == 9 else 8
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if kind in REFUSED:
            with pytest.raises(PlanError, match=r"narrow|wide"):
                fs.adapt(model, kind, rank=rank)
            assert fs.list_adapters(model) == []
            return
        adapter = fs.adapt(model, kind, rank=rank)
    got = adapter.attached.plan.choices["narrow"].get("rank", rank)
    if got < rank:
        assert any("narrow gets" in str(w.message) for w in told)
        assert got <= 4
    counted = adapter.structure.total_parameters(adapter.attached.plan)
    assert adapter.num_update_parameters == counted
    if adapter.structure.starts_at_zero:
        assert torch.equal(model(x), base)
    for parameter in adapter.parameters():
        parameter.data.add_(0.01 * draw(*parameter.shape, seed=2))
    wanted = model(x)
    adapter.save(tmp_path)
    adapter.detach()
    fs.load(model, tmp_path)
    torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)


def test_adapters_are_listed_without_waking_them():
    model = net()
    assert fs.list_adapters(model) == []
    fs.adapt(model, "lora", ["up"], name="a", rank=2)
    fs.activate(model, {"a": 0.5})
    fs.activate(model, None)
    fs.evict(model, "a")
    (listed,) = fs.list_adapters(model)
    assert (listed.name, listed.weight, listed.trained, listed.merged) == ("a", None, False, False)
    assert "a" not in model.__dict__["_finespun_adapters"].attached
    fs.activate(model, {"a": 0.5})
    assert fs.list_adapters(model)[0].weight == 0.5
    fs.merge(model, {"a": 1.0})
    assert fs.list_adapters(model)[0].merged
    with pytest.raises(StateError, match="merged"):
        fs.detach(model)
    fs.unmerge(model)
    fs.detach(model)
    assert fs.list_adapters(model) == []
    assert "_finespun_adapters" not in model.__dict__


def two(model):
    for name, seed in (("a", 3), ("b", 4), ("c", 5)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = fs.adapt(model, "lora", ["up", "down"], (), name=name, rank=2)
        for parameter in made.parameters():
            parameter.data.add_(0.1 * draw(*parameter.shape, seed=seed))
    return model


def test_several_adapters_train_at_once():
    model, x = two(net()), draw(2, 4, 24, seed=9)
    a, b = fs.make_trainable(model, ["a", "b"])
    model(x).square().sum().backward()
    trained = {id(p) for p in (*a.parameters(), *b.parameters())}
    for parameter in model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained) == parameter.requires_grad
    alone = two(net())
    first = fs.Adapter(alone, "a").make_trainable()
    fs.activate(alone, ["a", "b"])
    alone(x).square().sum().backward()
    for one, other in zip(a.parameters(), first.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert [f.trained for f in fs.list_adapters(model)] == [True, True, False]
    before = [p.detach().clone() for p in net().parameters()]
    fs.detach(model)
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.requires_grad for p in model.parameters())


def test_training_together_is_refused_whole():
    model = two(net())
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match="no adapter is called 'x'"):
        fs.make_trainable(model, ["a", "x"])
    with pytest.raises(InputError, match="at least one"):
        fs.make_trainable(model, [])
    assert [p.requires_grad for p in model.parameters()] == before


def test_names_and_weights_are_merged():
    model = two(net())
    x = draw(2, 4, 24, seed=9)
    fs.activate(model, {"a": 0.5, "b": 2.0})
    wanted, weights = model(x), copy.deepcopy(model.state_dict())
    fs.merge(model, {"a": 0.5, "b": 2.0})
    torch.testing.assert_close(model(x), wanted)
    fs.unmerge(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    fs.merge(model, "a")
    assert [f.merged for f in fs.list_adapters(model)] == [True, False, False]
    fs.unmerge(model)
    with pytest.raises(InputError, match="no adapter is called 'x'"):
        fs.merge(model, {"x": 1.0})


def test_a_target_that_is_not_there_is_named():
    with pytest.raises(TargetError, match="nearest: 'down'"):
        fs.adapt(net(), "lora", ["donw"])


def test_official_sides_are_those_of_the_papers_code():
    delta = fs.adapt(nn.Sequential(nn.Linear(768, 768)), "lsr", start="official").deltas["0"]
    assert (delta.choice["down"], delta.choice["up"]) == ([32, 24], [32, 24])
