"""An adapter folded into its base, as a transformers folder that needs no Finespun."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from finespun import files, models
from finespun.adapter import Adapter, load
from finespun.errors import FileError, InputError
from finespun.files import Saved
from finespun.files.overwrite import HEAD, INDEX, SHARDS
from finespun.hosts.plain import plain_state
from finespun.lifecycle.stored import StoredWeights, source_name
from finespun.models.quiet import quiet
from finespun.models.zoo import POOLING_FILE, find_model
from finespun.storage.atomic import located, whole_folder
from finespun.training.inference import Trained, origin

WEIGHT_FILES = ("model.safetensors", SHARDS, INDEX, HEAD, POOLING_FILE)
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Merged:
    """What was written: the class that loads it again, its parameters, and things worth knowing."""

    folder: Path
    architecture: str
    sites: int
    numbers: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        head = (
            f"{self.folder}: {self.architecture} with {self.numbers:,} parameters, "
            f"{self.sites} layers changed"
        )
        return "\n  ".join((head, *self.notes))


def merge(
    adapter: str | Path, out: str | Path, model: str | None = None, overwrite: bool = True
) -> Merged:
    """Fold W = W0 + ΔW at every site of the adapter in a folder and write the whole model to `out`:
    weights in safetensors, config, tokenizer, trained modules in the place of the base's own.

    The base is the one that the folder's recipe names, or `model`: a folder, a zoo or hub name.
    transformers alone loads the result. Of a sentence encoder with mean pooling the encoder is
    written, and its head beside it. An older model in `out` is replaced unless `overwrite` is
    False; adapters and runs always stay. Raises InputError where nothing says what the base is or
    older work stays in the way, StateError where an update cannot be merged (a bypass, a tied
    weight), FileError for files.
    """
    import transformers

    files.check_source(adapter, out)
    source = base_folder(Path(adapter), model)
    if located(source) == located(out):
        raise InputError(f"{str(out)!r} is the base itself; name another folder")
    files.refuse_to_lose(out, "model", overwrite)
    held, tokenizer = on_base(Path(adapter), model)
    held.merge(undo="none")
    state = plain_state(held.model)
    body, notes, head = held.model, list[str](), dict[str, Tensor]()
    if isinstance(body, models.MeanPooledClassifier):
        head = {k: v.contiguous() for k, v in state.items() if k.startswith("classifier.")}
        state = {k.removeprefix("encoder."): v for k, v in state.items() if k not in head}
        body = body.encoder
        notes.append(f"mean pooling and the head are no transformers class: {HEAD} holds it")
    if not isinstance(body, transformers.PreTrainedModel):
        raise InputError(f"{type(body).__name__} is no transformers model: merge it in Python")
    size = sum(tensor.nbytes for tensor in state.values())
    with whole_folder(out, size + (1 << 24)) as work, quiet():
        body.save_pretrained(work, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        if head:
            save_file(head, work / HEAD)
            (work / POOLING_FILE).parent.mkdir()
            (work / POOLING_FILE).write_bytes((Path(source) / POOLING_FILE).read_bytes())
        new = {path.relative_to(work) for path in work.rglob("*")}
    _drop_older(located(out), new)
    names = {k: v for k, v in state.items() if k != "lm_head.weight"} if _tied(body) else state
    numbers = sum(tensor.numel() for tensor in names.values())
    kind, sites = type(body).__name__, len(held.attached.plan.sites)
    return Merged(Path(out), kind, sites, numbers, tuple(notes))


def _drop_older(folder: Path, new: set[Path]) -> None:
    """Delete what an older model left there that would be read as part of the new one."""
    for path in [p for pattern in WEIGHT_FILES for p in folder.glob(pattern)]:
        if path.relative_to(folder) not in new:
            path.unlink()


def _tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def base_folder(adapter: Path, model: str | None) -> str:
    """The folder of the adapter's base: `model`, a folder, a zoo or hub name, else the one that the
    adapter's recipe names. Raises InputError where nothing says it."""
    if model is not None:
        return find_model(model)
    try:
        recipe, _ = origin(adapter)
    except FileError as error:
        files.read_adapter(adapter)  # what is no adapter at all is told as that
        raise InputError(f"{error}; or name the base with --model (model=...)") from error
    return find_model(recipe.model)


def on_base(folder: Path, model: str | None = None) -> tuple[Adapter, Any]:
    """The adapter on its base, `model` or the one that its recipe names, and the tokenizer where
    there is one. Errors are those of `base_folder` and `load`."""
    import transformers

    if model is None:
        trained = Trained.open(folder)
        return trained.adapter, trained.text.tokenizer
    source = find_model(model)
    saved = files.read_adapter(folder, layers=lambda *asked: StoredWeights(source).sites(*asked))
    with quiet():
        net = base_of(source, saved, folder)
        has_words = any((Path(source) / f).is_file() for f in ("tokenizer.json", "vocab.txt"))
        has_words |= (Path(source) / "tokenizer_config.json").is_file()
        tokenizer = transformers.AutoTokenizer.from_pretrained(source) if has_words else None
    return load(net, folder), tokenizer


def base_of(source: str, saved: Saved, folder: Path) -> nn.Module:
    """The base model in folder `source`, of the class that the adapter was made for: that of its
    fingerprint, else of PEFT's task, else of the base's own config."""
    import transformers

    labels = _labels(saved)
    architecture = "" if saved.state.base is None else saved.state.base.architecture
    if architecture == models.MeanPooledClassifier.__name__:
        return models.load_classifier(source, labels or 2).model
    if not architecture:
        told = source_name(folder)[1]
        config = transformers.AutoConfig.from_pretrained(source)
        architecture = AUTO_CLASSES.get(told or "", "") or (config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise InputError(
            f"the adapter was made for a {architecture!r}, which is no class of transformers: load "
            "it on its model in Python, and merge or export it there"
        )
    more = {"num_labels": labels} if labels and "Classification" in architecture else {}
    try:
        net: nn.Module = cls.from_pretrained(source, dtype="auto", use_safetensors=True, **more)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FileError(f"model {source!r} cannot be loaded as {architecture}: {reason}") from error
    return net.eval()


def _labels(saved: Saved) -> int | None:
    """Outputs of the head that the adapter brings, if any."""
    rows = [
        slot.shape[0]
        for key, slot in saved.state.form.table.items()
        if key.owner == "module" and key.name.endswith("weight") and len(slot.shape) == 2
    ]
    return min(rows, default=None)
