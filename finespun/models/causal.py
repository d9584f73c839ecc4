"""Causal language models by name."""

import torch
from safetensors import SafetensorError

from finespun.errors import FileError
from finespun.models.loaded import Loaded
from finespun.models.quiet import quiet, reason
from finespun.models.zoo import find_model
from finespun.storage.blame import DAMAGED


def load_causal(name: str) -> Loaded:
    """Load a zoo model, a folder or a hub model as a causal language model in float32.

    Weights are read from safetensors only. Raises FileError where there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = find_model(name)
    with quiet():
        try:
            model, told = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, SafetensorError, ImportError, *DAMAGED) as error:
            raise FileError(f"model {name!r} is no language model here: {reason(error)}") from error
    if missing := sorted(told["missing_keys"]):
        raise FileError(
            f"model {name!r} is no language model: {missing[0]!r} is not in its weights, nor are "
            f"{len(missing) - 1} others; try smollm2-135m"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Loaded(name, model.eval(), tokenizer, ())
