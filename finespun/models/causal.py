"""Causal language models by name, among them one that travels in a package as GGUF."""

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from finespun.errors import FileError
from finespun.models.zoo import TextModel, find_model, quiet


def load_language_model(name: str) -> TextModel:
    """Load a zoo model, a folder or a hub model as a causal language model in float32.

    Weights are read from safetensors only. Raises FileError where there is no such model.
    """
    source = find_model(name)
    with quiet():
        try:
            model, told = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FileError(f"model {name!r} is no language model here: {reason}") from error
    if missing := sorted(told["missing_keys"]):
        raise FileError(
            f"model {name!r} is no language model: {missing[0]!r} is not in its weights, nor are "
            f"{len(missing) - 1} others; try smollm2-135m"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TextModel(name, model.eval(), tokenizer, ())


def slices_logits(model: nn.Module) -> bool:
    """Whether the model computes logits for chosen positions only, if asked."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def write_from_gguf(source: Path, folder: Path) -> None:
    """Make a transformers folder, float32 in safetensors, of a GGUF file with its tokenizer.

    The numbers are the rounded ones of the file. Raises FileError where it cannot be read.
    """
    place, file = str(source.parent), source.name
    with quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(place, gguf_file=file)
            model: Any = AutoModelForCausalLM.from_pretrained(
                place, gguf_file=file, dtype=torch.float32
            )
        except (OSError, ValueError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FileError(f"{source} cannot be read: {reason}") from error
    del model.config.quantization_config
    model.config._name_or_path = ""
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    if not model.config.tie_word_embeddings:
        state["lm_head.weight"] = model.lm_head.weight.detach().clone()
    folder.mkdir()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
