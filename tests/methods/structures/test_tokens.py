"""Trained rows of a table."""

import pytest
import torch
from peft_kinds import IDS, Kinds
from suite import stir
from torch import nn

import finespun as fs
from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.methods.structures import Tokens


@pytest.mark.parametrize(("name", "rows"), [("embed", (4, 0)), ("head", (2,))])
def test_the_rows_named_are_the_trained_numbers_and_no_other_moves(name, rows):
    model, base = Kinds().eval(), Kinds()
    adapter = fs.adapt(model, Tokens(tokens=rows), [name])
    with torch.no_grad():
        assert torch.equal(model(IDS), base(IDS))
    stir(adapter.parameters())
    values = adapter.deltas[name].values.detach()
    wanted = base.get_submodule(name).weight.detach().clone()
    width = wanted.shape[1]
    assert adapter.num_update_parameters == values.numel() == len(rows) * width
    wanted[list(rows)] = values
    adapter.merge()
    assert torch.allclose(model.get_submodule(name).weight, wanted, atol=1e-6)


def test_only_the_tokens_named_have_gradients():
    adapter = fs.adapt(Kinds(), Tokens(tokens=(4, 10)), ["embed"])
    adapter.model(torch.tensor([[4, 1, 1, 1, 1, 1, 1, 1]])).sum().backward()
    rows = adapter.deltas["embed"].values.grad.abs().sum(1)
    assert rows[0] > 0
    assert rows[1] == 0


@pytest.mark.parametrize("tokens", [(), (1, 1), (-1,)])
def test_tokens_must_be_rows_each_once(tokens):
    with pytest.raises(InputError, match=r"tokens=.* must be row numbers, each once; try \(0, 1\)"):
        Tokens(tokens=tokens)


@pytest.mark.parametrize("tokens", [(1.5,), (True, "a"), 3])
def test_tokens_must_be_whole_numbers(tokens):
    with pytest.raises(
        InputError, match=r"tokens=.* must be whole numbers in brackets; try \(0,\)"
    ):
        Tokens(tokens=tokens)


def test_tokens_that_the_table_does_not_have_are_named():
    with pytest.raises(PlanError, match=r"tokens=\[11\] are no rows of 'embed', which has 0 to 10"):
        fs.adapt(Kinds(), Tokens(tokens=(3, 11)), ["embed"])


def test_a_table_is_read_by_its_kind():
    tokens = Tokens(tokens=(1, 2, 3))
    assert tokens.num_parameters(SiteShape("x", 6, 11, "embedding")) == 3 * 6
    assert tokens.num_parameters(SiteShape("x", 11, 6)) == 3 * 6


def test_biases_beside_a_lora_stay_when_it_is_made_smaller(tmp_path):
    import peft

    theirs = peft.get_peft_model(
        Kinds().eval(), peft.LoraConfig(r=3, target_modules=["up"], bias="all")
    ).eval()
    stir([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "x")
    with pytest.warns(UserWarning, match="carries no fingerprint"):
        adapter = fs.load(Kinds().eval(), tmp_path / "x", trainable=True)
    delta = adapter.deltas["up"]
    delta.switch_off(delta.groups("rank")[1])
    with torch.no_grad():
        wanted = adapter.model(IDS)
    numbers = adapter.num_update_parameters
    adapter.compact()
    assert adapter.num_update_parameters == numbers - (6 + 8)
    with torch.no_grad():
        assert torch.allclose(adapter.model(IDS), wanted, atol=1e-6)
    adapter.export(tmp_path / "y", portable=False)
    again = peft.PeftModel.from_pretrained(Kinds().eval(), tmp_path / "y").eval()
    with torch.no_grad():
        assert torch.allclose(again(IDS), wanted, atol=1e-5)
    assert isinstance(adapter.model.up, nn.Linear)
