"""A weight that two modules share: the update acts where it was asked for, or at both uses."""

import copy

import pytest
import torch

import finespun as fs
from finespun.errors import InputError, StateError, TargetError


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def stirred(targets, structure=None, **options):
    model = language_model()
    plain = copy.deepcopy(model)
    adapter = fs.adapt(model, structure or fs.LoRA(rank=2), targets, **options)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, plain, adapter, torch.randint(0, 40, (2, 7))


def untied(plain, name, change):
    """The base with its own weights at both uses, `change` added at one."""
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    plain.get_submodule(name).weight.data += change
    return plain


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_update_acts_at_the_use_that_was_named(name):
    model, plain, adapter, ids = stirred([name])
    change = adapter.updates()[name].dense()
    wanted = untied(plain, name, change.T if name != "lm_head" else change)
    torch.testing.assert_close(model(ids).logits, wanted(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(StateError, match="tie_word_embeddings=False"):
        adapter.merge()


@pytest.mark.parametrize("structure", [fs.LoRA(rank=2), fs.LSR(rank=2, separation_rank=3)])
@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_update_at_both_uses_is_one_update(name, structure):
    model, plain, adapter, ids = stirred([name], structure, tie="both")
    assert adapter.num_update_parameters == structure.total_parameters(adapter.attached.plan)
    change = adapter.updates()[name].dense().detach()
    plain.lm_head.weight.data += change.T if name != "lm_head" else change
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    y = model(ids).logits
    adapter.merge()
    torch.testing.assert_close(model(ids).logits, y, atol=1e-5, rtol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter.unmerge()
    assert torch.equal(model(ids).logits, y)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        fs.Adapter(twin, "default").parameters()[0].zero_()
    assert not torch.equal(twin(ids).logits, y)
    assert torch.equal(model(ids).logits, y)
    adapter.detach()
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.model.embed_tokens) is torch.nn.Embedding


def test_both_uses_survive_a_file(tmp_path):
    model, _, adapter, ids = stirred(["lm_head"], tie="both")
    adapter.save(tmp_path / "a")
    other = language_model()
    fs.load(other, tmp_path / "a")
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_an_unknown_tie_is_refused():
    with pytest.raises(InputError, match="tie='bth' is not known; try 'both'"):
        fs.adapt(language_model(), fs.LoRA(rank=2), ["lm_head"], tie="bth")


def test_naming_both_uses_is_refused():
    with pytest.raises(TargetError, match="share one weight"):
        fs.adapt(language_model(), fs.LoRA(rank=2), ["lm_head", "embed_tokens"], tie="both")
