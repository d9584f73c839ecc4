"""The same random Llama twice: adapted by us, and wrapped by PEFT with the very same parameters."""

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import finespun as fs
from benchmarks.measure import DEVICE

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = 1000


def llama(width: int, layers: int) -> LlamaModel:
    """A random Llama body in float32; the same values for the same shape."""
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=1024,
            use_cache=False,
        )
    )


def tokens(rows: int, length: int) -> Tensor:
    """Token numbers (rows, length)."""
    one = torch.Generator("cpu").manual_seed(1)
    return torch.randint(VOCABULARY, (rows, length), generator=one, device="cpu").to(DEVICE)


def pair(
    width: int, layers: int, rank: int, names: Sequence[str] = ("default",), dropout: float = 0.0
) -> tuple[LlamaModel, PeftModel]:
    """Two models of equal weights and equal LoRA adapters, ours and PEFT's; the last is active."""
    ours, base = llama(width, layers), llama(width, layers)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=list(LINEARS)
    )
    theirs = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    for seed, name in enumerate(names):
        adapter = fs.adapt(ours, fs.LoRA(rank=rank, dropout=dropout), LINEARS, (), name)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_(0.0, 0.02)
            for site, delta in adapter.deltas.items():
                layer = theirs.base_model.model.get_submodule(site)
                layer.lora_A[name].weight.copy_(delta.A)
                layer.lora_B[name].weight.copy_(delta.B)
    theirs.set_adapter(names[-1])
    return ours, theirs


def hidden(model: nn.Module, ids: Tensor, **more: object) -> Tensor:
    """The last hidden states."""
    out: Tensor = model(ids, **more).last_hidden_state
    return out


def same(ours: Tensor, theirs: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Raise RuntimeError where the two are not equal: then no time means anything."""
    error = float((ours - theirs).detach().norm() / theirs.detach().norm())
    if not error <= tolerance:
        raise RuntimeError(f"{what} differ by {error:.2g}, more than {tolerance}")
