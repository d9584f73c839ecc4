"""Turn a BERT encoder exported to ONNX back into a transformers folder."""

import json
import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from finespun.errors import FileError, InputError

_PREFIX = re.compile(r"(?:^|\.)((?:embeddings|encoder)\..+)$")


def read_onnx_bert(path: Path) -> dict[str, torch.Tensor]:
    """The weights of an ONNX BERT under transformers' names.

    Embeddings, norms and biases keep their names in the export. A linear weight loses its own: it
    is the nameless (in, out) operand of the MatMul whose result meets a named bias in an Add, and
    becomes `<bias name>.weight` of shape (out, in).

    Raises InputError if the package onnx is missing, FileError if the file holds no BERT.
    """
    try:
        import onnx
    except ImportError as error:
        raise InputError("reading an .onnx model needs the package onnx") from error
    graph = onnx.load(str(path)).graph
    arrays: dict[str, NDArray[np.float32]] = {
        item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer
    }
    found = {match[1]: name for name in arrays if (match := _PREFIX.search(name))}
    weights = {key: arrays[name] for key, name in found.items() if not key.endswith("position_ids")}
    keys = {name: key for key, name in found.items()}
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        bias = next((keys[i] for i in node.input if keys.get(i, "").endswith(".bias")), None)
        product = next((makers[i] for i in node.input if i in makers), None)
        if node.op_type == "Add" and bias and product and product.op_type == "MatMul":
            operand = next(i for i in product.input if i in arrays)
            weights[bias.removesuffix("bias") + "weight"] = arrays[operand].T
    if "embeddings.word_embeddings.weight" not in weights:
        raise FileError(f"{path} holds no BERT encoder: no embeddings.word_embeddings.weight")
    return {key: torch.from_numpy(np.array(array, order="C")) for key, array in weights.items()}


def write_bert_folder(source: Path, folder: Path, attention_heads: int) -> None:
    """Write `config.json` and `model.safetensors` for the ONNX file `source` into a new folder."""
    weights = read_onnx_bert(source)
    layers = [int(m[1]) for key in weights if (m := re.match(r"encoder\.layer\.(\d+)\.", key))]
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": attention_heads,
        "intermediate_size": len(weights["encoder.layer.0.intermediate.dense.bias"]),
        "max_position_embeddings": len(weights["embeddings.position_embeddings.weight"]),
        "type_vocab_size": len(weights["embeddings.token_type_embeddings.weight"]),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
