"""A first recipe for one's own table: columns, kind of labels, targets and sizes guessed."""

import math
import re
from pathlib import Path

import polars as pl
import yaml

from finespun.errors import InputError, nearest
from finespun.methods.structures import LSR
from finespun.models import ZOO, find_model
from finespun.recipes.recipe import Recipe
from finespun.storage.safe_io import read_json
from finespun.tasks.tables import MANY_CLASSES, guess_labels, read_table

PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("query", "passage"),
    ("question", "answer"),
)
TEXTS = ("text", "sentence", "question", "review", "content", "message", "comment", "tweet", "body")
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "type")
NUMBERS = ("score", "rating", "stars", "value", "y")

# The query and value projections, by transformers' model_type.
TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), ("query", "value")),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "opt"), ("q_proj", "v_proj")),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "modernbert": ("Wqkv",),
    "gpt2": ("c_attn",),
    "t5": ("q", "v"),
}
FEWEST_STEPS = 100


def suggest_recipe(data_path: str | Path, model_name: str) -> str:
    """The text of a commented recipe for a table and a model, ready to be trained.

    Raises FileError if the table cannot be read, InputError if no text or label column stands out.
    """
    table = read_table(data_path)
    text, pair = _text_columns(table, str(data_path))
    label = _label_column(table, {text, pair}, str(data_path))
    targets = _targets(model_name)
    kind = guess_labels(table[label])
    note = f"{table[label].n_unique()} classes" if kind == "classes" else "a number to predict"
    structure = LSR()
    batch = 32 if len(table) >= 500 else 8
    lines = [
        f"# Guessed from {Path(data_path).name}: {len(table)} rows. Change what does not fit.",
        f"# Any line can be overridden when it runs: finespun train {_name(data_path)} "
        "training.epochs=5",
        f"model: {_plain(model_name)}",
        "data:",
        f"  file: {_plain(str(data_path))}",
        f"  text: {_plain(text)}",
        *([f"  pair: {_plain(pair)}"] if pair else []),
        f"  label: {_plain(label)}",
        f"  labels: {kind}  # {note}",
        "  test_share: 0.2  # rows held out to measure on; or give test_file",
        "structure:",
        f"  kind: {structure.kind}  # lora is the other usual choice",
        f"  rank: {structure.rank}  # more for harder tasks",
        f"  separation_rank: {structure.separation_rank}",
        f"targets: {targets}",
        "training:",
        f"  epochs: {_epochs(len(table), batch)}",
        f"  batch_size: {batch}",
        f"  lr: {structure.usual_lr}  # 1e-3 suits lora",
        f"  max_length: {_max_length(table, text, pair)}  # tokens; longer rows are cut",
        f"output: {_plain('out/' + Path(data_path).stem)}",
    ]
    recipe = "\n".join(lines) + "\n"
    Recipe.parse(recipe)
    return recipe


def _name(data_path: str | Path) -> str:
    return f"{Path(data_path).stem}.yaml"


def _text_columns(table: pl.DataFrame, path: str) -> tuple[str, str | None]:
    known = {name.lower(): name for name in table.columns if table[name].dtype == pl.String}
    for first, second in PAIRS:
        if first in known and second in known:
            return known[first], known[second]
    for name in TEXTS:
        if name in known:
            return known[name], None
    if not known:
        raise InputError(
            f"{path!r} has no column of text; columns: {', '.join(map(repr, table.columns))}"
        )
    return max(known.values(), key=lambda name: _mean_length(table[name])), None


def _mean_length(column: pl.Series) -> float:
    return float(column.str.len_chars().fill_null(0).sum()) / len(column)


def _label_column(table: pl.DataFrame, taken: set[str | None], path: str) -> str:
    """The column called like a label, one with such a word in its name, or the last full one with
    few values. Raises InputError where none stands out or all its values are one."""
    free = [name for name in table.columns if name not in taken]
    known = {name.lower(): name for name in free}
    named = [known[name] for name in (*LABELS, *NUMBERS) if name in known]
    words = {name: set(re.findall(r"[a-z]+", name.lower())) for name in free}
    named += [name for name in free if words[name] & {*LABELS, *NUMBERS}]
    if named:
        if table[named[0]].drop_nulls().n_unique() < 2:
            raise InputError(
                f"{path!r}: all labels in {named[0]!r} are the same; there is nothing to learn"
            )
        return named[0]
    for name in reversed(free):
        if table[name].null_count():
            continue
        values = table[name].n_unique()
        if table[name].dtype.is_float() or 2 <= values <= min(MANY_CLASSES, len(table) // 2):
            return name
    raise InputError(
        f"{path!r}: no column looks like a label; {nearest('label', free)}. "
        "Rename it to 'label', or write the recipe by hand"
    )


def _targets(model_name: str) -> str:
    if model_name in ZOO:
        kind = ZOO[model_name].kind
    else:
        config = Path(find_model(model_name)) / "config.json"
        kind = read_json(config).get("model_type", "")
    if kind not in TARGETS:
        return f"all-linear  # every linear layer; no smaller choice is known for {kind or 'it'}"
    return f"[{', '.join(TARGETS[kind])}]  # all-linear adapts more layers"


def _epochs(rows: int, batch: int) -> int:
    """Three, or more for few rows, so that about 100 steps are made; at most 20."""
    steps = math.ceil(0.8 * rows / batch)
    return min(20, max(3, math.ceil(FEWEST_STEPS / steps)))


def _max_length(table: pl.DataFrame, text: str, pair: str | None) -> int:
    """The least of 32, 64, ... 512 that holds 99 % of the rows, at 3 characters a token."""
    lengths = table[text].str.len_chars().fill_null(0)
    if pair is not None:
        lengths = lengths + table[pair].str.len_chars().fill_null(0)
    tokens = float(lengths.quantile(0.99) or 0) / 3 + 3
    return next((size for size in (32, 64, 128, 256) if size >= tokens), 512)


def _plain(value: str) -> str:
    """A YAML scalar, quoted where it needs to be."""
    return yaml.safe_dump(value, allow_unicode=True, width=10**6).removesuffix("\n...\n").strip()
