"""Encoders by name with a head on top: classes, or one value."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from finespun.errors import FileError, InputError
from finespun.models.loaded import Loaded
from finespun.models.quiet import quiet, reason
from finespun.models.zoo import POOLING_FILE, find_model
from finespun.storage.blame import DAMAGED
from finespun.storage.safe_io import read_json


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean of its last states over real tokens, and one linear layer.

    m = mean_t(h_t), logits = W m / rms(m) + b, with h: (batch, tokens, width) and logits:
    (batch, labels). Sentence encoders were trained with this mean; their [CLS] pooler was not.
    The division makes features of size 1, so that the head learns at the adapter's learning rate.
    `labels` add a loss to the output: mean squared error for one label, else cross-entropy.
    """

    def __init__(self, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        self.config: Any = config
        self.num_labels = num_labels
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        nn.init.normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        kinds = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kinds)
        mask = attention_mask.unsqueeze(-1).to(states.last_hidden_state.dtype)
        mean = (states.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)
        logits = self.classifier(functional.rms_norm(mean, mean.shape[-1:]))
        loss = None
        if labels is not None and self.num_labels == 1:
            loss = functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        elif labels is not None:
            loss = functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_classifier(name: str, num_labels: int = 2, *, seed: int = 0) -> Loaded:
    """Load a zoo model, a local folder or a hub model in float32, with a head of `num_labels`
    outputs: class scores, or one value to be learnt by mean squared error.

    Sentence encoders (folders that carry `1_Pooling/config.json` with mean pooling) get a
    `MeanPooledClassifier`; all others transformers' own sequence classifier. What starts untrained
    is drawn from `seed` and named in `fresh`. Weights are read from safetensors only.

    Raises InputError for no outputs, FileError if no such model is found.
    """
    if num_labels < 1:
        raise InputError(f"num_labels = {num_labels}; 1 predicts a value, 2 or more are classes")
    source = find_model(name)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if _pools_by_mean(source):
                encoder = AutoModel.from_pretrained(
                    source,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    **_pooler_free(source),
                )
                model: nn.Module = MeanPooledClassifier(encoder, num_labels)
                fresh: tuple[str, ...] = ("classifier",)
            else:
                model, fresh = _sequence_classifier(source, num_labels)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, SafetensorError, ImportError, *DAMAGED) as error:
            raise FileError(f"model {name!r} cannot be loaded: {reason(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return Loaded(name, model.eval(), tokenizer, fresh)


def _pools_by_mean(source: str) -> bool:
    file = Path(source) / POOLING_FILE
    return file.is_file() and bool(read_json(file).get("pooling_mode_mean_tokens"))


def _pooler_free(source: str) -> dict[str, bool]:
    """The option that leaves out an unused pooler, for the architectures that have it."""
    kind = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
    return {"add_pooling_layer": False} if kind in ("bert", "roberta", "xlm-roberta") else {}


def _sequence_classifier(source: str, num_labels: int) -> tuple[nn.Module, tuple[str, ...]]:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        source,
        num_labels=num_labels,
        problem_type="regression" if num_labels == 1 else "single_label_classification",
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    keys = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    return model, tuple(sorted({key.rpartition(".")[0] for key in keys}))
