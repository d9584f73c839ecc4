"""The shared suite, part four: several adapters at once, by weight or by row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from suite import CASES, WIDTH, adapted, batch, draw, every, net, relative, stirred, twin
from torch import nn

import finespun as fs
from finespun.errors import InputError, StateError
from finespun.hosts import adapter_set_of
from finespun.hosts.adapter_set import Rows

LORA = CASES[0]


def pair(case, model, train=()):
    """The model with two stirred adapters, "one" and "another"; the second is active."""
    stirred(case, model, train, "one")
    stirred(case, model, train, "another")
    return model


def each_alone(model, x, names):
    """Row i as names[i] alone gives it, in the same batch."""
    alone = {}
    for name in set(names):
        fs.activate(model, name)
        alone[name] = model(x)
    return torch.stack([alone[name][i] for i, name in enumerate(names)])


@pytest.mark.parametrize("train", [(), ("head",)])
@every()
def test_mixed_rows_are_each_row_alone(case, train):
    plain, x = net(), batch()
    model = pair(case, twin(plain), train)
    names = ["one", None, "another", "one", None, "another"]
    wanted = each_alone(model, x, names)
    with fs.rows(model, names):
        y = model(x)
    assert relative(y, wanted) <= 2e-6
    assert torch.equal(y[[1, 4]], plain(x)[[1, 4]])
    gaps = [relative(wanted[i], plain(x)[i]) for i in (0, 2)]
    assert min(gaps) > 1e-4


@every()
def test_repeated_rows_go_to_blocks_of_the_batch(case):
    model = pair(case, net())
    x = batch(3).repeat_interleave(2, 0)
    wanted = each_alone(model, x, ["one", "one", None, None, "another", "another"])
    with fs.rows(model, ["one", None, "another"], repeat=2):
        assert relative(model(x), wanted) <= 2e-6


@every()
def test_rows_carry_gradients_and_strength(case):
    model = pair(case, net())
    first, second = fs.Adapter(model, "one"), fs.Adapter(model, "another").make_trainable()
    x, first.scale = batch(2), 0.5
    wanted = each_alone(model, x, ["one", "another"])
    with fs.rows(model, ["one", "another"]):
        y = model(x)
        assert relative(y, wanted) <= 2e-6
        grown = torch.autograd.grad(y[1].sum(), second.parameters())
        none = torch.autograd.grad(model(x)[0].sum(), second.parameters())
    assert all(g.abs().sum() > 0 for g in grown)
    assert all(g.abs().sum() == 0 for g in none)


@every()
def test_rows_that_cannot_be_told_apart_raise(case):
    model = pair(case, net())
    with (
        pytest.raises(StateError, match="5 rows while rows\\(\\) names 2: give one name"),
        fs.rows(model, ["one", None]),
    ):
        model(batch(5))
    with pytest.raises(StateError, match="names 0"), fs.rows(model, []):
        model(batch(2))


@every()
def test_weighted_activation_is_the_weighted_sum(case):
    model = pair(case, net())
    name = next(iter(fs.Adapter(model, "one").deltas))
    layer, h = model.get_submodule(name), draw(5, WIDTH, seed=8)
    parts = {}
    for choice in (None, "one", "another"):
        fs.activate(model, choice)
        parts[choice] = layer(h).double()
    fs.activate(model, {"one": 0.7, "another": 0.3})
    changes = {k: parts[k] - parts[None] for k in ("one", "another")}
    wanted = parts[None] + 0.7 * changes["one"] + 0.3 * changes["another"]
    assert relative(layer(h), wanted) <= 2e-6
    fs.activate(model, ["one", "another"])
    assert relative(layer(h), parts[None] + changes["one"] + changes["another"]) <= 2e-6


def test_two_own_heads_at_once_are_refused():
    model = pair(LORA, net(), ("head",))
    fs.activate(model, {"one": 0.7, "another": 0.3})
    with pytest.raises(StateError, match=r"'one', 'another'.*'head'"):
        model(batch())


def test_heads_of_different_sizes_cannot_share_a_batch():
    model = pair(LORA, net(), ("head",))
    fs.Adapter(model, "one").attached.copies["head"].__init__(WIDTH, 7)
    fs.activate(model, "one")
    assert model(batch()).shape == (6, 7)
    with pytest.raises(StateError, match=r"'head'.*\(7,\).*\(5,\)"), fs.rows(model, ["one", None]):
        model(batch(2))


def test_rows_end_with_their_block_even_after_an_error():
    model = pair(LORA, net())
    before = model(batch())
    with pytest.raises(StateError), fs.rows(model, ["one"] * 4):
        model(batch(6))
    assert adapter_set_of(model).rows is None
    with fs.rows(model, ["one"]):
        with fs.rows(model, [None]):
            assert adapter_set_of(model).rows == Rows((None,))
        assert adapter_set_of(model).rows == Rows(("one",))
    assert torch.equal(model(batch()), before)


def test_unknown_names_are_refused_before_anything_happens():
    model = pair(LORA, net())
    with pytest.raises(InputError, match=r"'oen'.*'one'"):
        fs.activate(model, "oen")
    with pytest.raises(InputError, match=r"'oen'.*'one'"), fs.rows(model, ["oen"]):
        pass
    assert adapter_set_of(model).active == (("another", 1.0),)
    with pytest.raises(InputError, match=r"'one' is already there"):
        adapted(LORA, model, name="one")
    with pytest.raises(InputError, match=r"'a.b'"):
        adapted(LORA, model, name="a.b")


def test_an_evicted_adapter_comes_back_for_its_rows():
    model = pair(LORA, net())
    x, names = batch(2), ["one", "another"]
    wanted = each_alone(model, x, names)
    fs.activate(model, "another")
    fs.evict(model, "one")
    with fs.rows(model, names):
        assert relative(model(x), wanted) <= 2e-6


def test_a_layer_that_changes_the_number_of_rows_raises():
    class Fold(nn.Linear):
        def forward(self, x):
            return super().forward(x).reshape(2, -1, self.out_features)

    model = nn.Sequential(Fold(4, 4))
    fs.adapt(model, fs.LoRA(rank=1), ["0"], (), "one")
    with pytest.raises(StateError, match="changes the number of rows"), fs.rows(model, ["one"]):
        model(torch.zeros(1, 4, 4))


@pytest.mark.parametrize(("names", "rows", "times"), [(["one", None], 6, 3), (["one"], 4, 4)])
def test_a_forgotten_name_is_noticed(names, rows, times):
    """Fewer names than rows are never spread over the batch unless that is said."""
    model, x = pair(LORA, net()), batch(rows)
    message = rf"{rows} rows .* names {len(names)}: repeat={times} if"
    with pytest.raises(StateError, match=message), fs.rows(model, names):
        model(x)
    with fs.rows(model, names, repeat=times):
        spread = model(x)
    with fs.rows(model, [name for name in names for _ in range(times)]):
        assert torch.equal(model(x), spread)
    with pytest.raises(StateError, match="names 2"), fs.rows(model, ["one"], repeat=2):
        model(x)
    for repeat, lengths in ((0, None), (2, [3])):
        with pytest.raises(InputError, match=f"repeat={repeat}"):
            fs.rows(model, ["one"], lengths, repeat).__enter__()


def test_rows_are_counted_by_the_models_main_input():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, positions, input_ids=None):
            return self.up(input_ids if input_ids is not None else positions["sample"])

    model = Named()
    fs.adapt(model, fs.LoRA(rank=1), ["up"], name="one")
    with fs.rows(model, ["one", None]):
        assert model(positions=torch.arange(7), input_ids=torch.ones(2, 4)).shape == (2, 3)
        assert model({"sample": torch.ones(2, 4), "more": torch.ones(9)}).shape == (2, 3)
        with pytest.raises(StateError, match="given 4 rows"):
            model(positions=torch.arange(2), input_ids=torch.ones(4, 4))
        with pytest.raises(StateError, match="given 4 rows"):
            model({"more": torch.ones(2), "sample": torch.ones(4, 4)})


def test_what_serves_rows_can_neither_be_evicted_nor_detached():
    model, x = pair(LORA, net()), batch(2)
    fs.activate(model, None)
    with fs.rows(model, ["one", "another"]):
        y = model(x)
        with pytest.raises(StateError, match="'one' is active"):
            fs.evict(model, "one")
        with pytest.raises(StateError, match="'one' serves rows"):
            fs.Adapter(model, "one").detach()
        assert torch.equal(model(x), y)
    fs.evict(model, "one")
    fs.Adapter(model, "one").detach()
    assert list(adapter_set_of(model).states) == ["another"]


@given(st.lists(st.sampled_from([None, "a", "b"]), min_size=1, max_size=7), st.integers(1, 5))
def test_the_index_covers_every_row_once(names, block):
    rows = Rows(tuple(names))
    found = dict(rows.index(len(names) * block, "m", torch.device("cpu")))
    owner = [None] * (len(names) * block)
    for name, numbers in found.items():
        for i in numbers.tolist():
            assert owner[i] is None
            owner[i] = name
    assert owner == [name for name in names for _ in range(block)]
    if len(names) > 1:
        with pytest.raises(StateError, match=r"'m'"):
            rows.index(len(names) * block + 1, "m", torch.device("cpu"))
