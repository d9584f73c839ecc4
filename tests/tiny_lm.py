"""A random language model of two layers, its tokenizer, a table and a recipe: a run in seconds."""

from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_run import BAD, GOOD, WORDS, tiny_table

ASK = ("Text", ":", "Kind", "bad", "good", "very", "[CLS]", "said", "user", "answer")
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}answer :{% endif %}"
)
PROMPT = "Text: {text}\nKind:"


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *ASK, *WORDS, *GOOD, *BAD]
    made = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


def language_model(family: str = "llama") -> Any:
    """A random Llama, or a GPT-2 (positions are added to embeddings there)."""
    import transformers as t

    common = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if family == "gpt2":
            size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
            size |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            return t.GPT2LMHeadModel(t.GPT2Config(**size, **common, initializer_range=0.2)).eval()
        config = t.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=True, **common,
        )  # fmt: skip
        return t.LlamaForCausalLM(config).eval()


def write_lm_recipe(folder: Path, **changes: Any) -> Path:
    """Model, table and recipe.yaml; `changes` are put into the recipe's sections."""
    if not (folder / "model").exists():
        language_model().save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        tiny_table(folder / "table.csv")
    recipe = {
        "model": str(folder / "model"),
        "data": {"file": str(folder / "table.csv"), "prompt": PROMPT},
        "structure": {"kind": "lora", "rank": 8},
        "targets": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "training": {"epochs": 12, "batch_size": 8, "lr": 2e-2, "max_length": 32, "threads": 1},
        "output": str(folder / "out"),
    }
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) else value
    path = folder / "lm.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
