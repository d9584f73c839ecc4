"""Turn a causal language model in a GGUF file back into a transformers folder."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finespun.errors import FileError
from finespun.models.quiet import quiet, reason
from finespun.storage.blame import DAMAGED


def write_from_gguf(source: Path, folder: Path) -> None:
    """Make a transformers folder, float32 in safetensors, of a GGUF file with its tokenizer.

    The parameters are the rounded ones of the file. Raises FileError where it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, file = str(source.parent), source.name
    with quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                place, gguf_file=file, trust_remote_code=False
            )
            model: Any = AutoModelForCausalLM.from_pretrained(
                place, gguf_file=file, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ImportError, *DAMAGED) as error:
            raise FileError(f"{source} cannot be read: {reason(error)}") from error
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
