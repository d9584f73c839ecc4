"""Tiny models and PEFT folders for the tests of export and of reading PEFT's format."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from suite import stir
from torch import nn

import finespun as fs

PREFIX = "base_model.model."


def later(kind: str, **options: Any) -> Callable[[], Any]:
    """A maker of PEFT's configuration `kind`, so that a table of cases imports no PEFT."""

    def make() -> Any:
        import peft

        return getattr(peft, kind)(**options)

    return make


def bert(seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36,
            vocab_size=50, num_labels=3, initializer_range=0.3,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50)).eval()


def llama(tied: bool = True, layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=36, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


WORDS = torch.arange(14).view(2, 7)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=WORDS).logits


def in_peft(model: nn.Module, folder: Path) -> nn.Module:
    """The folder loaded by PEFT, which has nothing to say against it."""
    import peft

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
