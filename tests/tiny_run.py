"""A whole run in a moment: a random two-layer BERT, a table of made-up sentences, a recipe."""

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from finespun.recipes.recipe import Recipe
from finespun.training.progress import Reporter
from finespun.training.run import prepare, surroundings

WORDS = ("the", "a", "cat", "dog", "ship", "train", "runs", "sleeps", "stops", "today", "soon")
GOOD, BAD = ("fine", "bright", "lovely"), ("grim", "dull", "broken")
CLASSES = ("bad", "good")


def tiny_model(folder: Path, dropout: float = 0.1) -> Path:
    """A random sentence encoder of width 16, whose tokenizer knows the table's words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *GOOD, *BAD]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def tiny_table(file: Path, rows: int = 80, pairs: bool = False, numbers: bool = False) -> Path:
    """Rows whose label says whether a good or a bad word stands among the others."""
    draw = random.Random(5)
    lines = ["text,other,label" if pairs else "text,label"]
    for i in range(rows):
        good = i % 2
        words = [*draw.choices(WORDS, k=draw.randint(2, 9)), draw.choice(GOOD if good else BAD)]
        draw.shuffle(words)
        label = f"{good}.5" if numbers else CLASSES[good]
        other = [" ".join(draw.choices(WORDS, k=3))] if pairs else []
        lines.append(",".join([" ".join(words), *other, label]))
    file.write_text("\n".join(lines) + "\n")
    return file


def tiny_recipe(folder: Path, **training: Any) -> dict[str, Any]:
    """The recipe as plain values: 64 rows in 8 batches, 2 epochs, a checkpoint every 3 steps."""
    return {
        "model": str(folder / "model"),
        "data": {"file": str(folder / "table.csv")},
        "structure": {"kind": "lsr", "rank": 2, "separation_rank": 3},
        "targets": ["query", "value"],
        "training": {
            "epochs": 2,
            "batch_size": 8,
            "lr": 3e-2,
            "max_length": 16,
            "threads": 1,
            "checkpoint_every": 3,
            **training,
        },
        "output": str(folder / "out"),
    }


def write_recipe(folder: Path, **training: Any) -> Path:
    """Model, table and recipe.yaml in `folder`; returns the recipe's path."""
    if not (folder / "model").exists():
        tiny_model(folder / "model")
        tiny_table(folder / "table.csv")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, **training)))
    return path


class Events(Reporter):
    """Keeps every event of a run."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def tell(self, record: Any) -> None:
        self.records.append(record)

    def notes(self) -> str:
        """The texts of all notes."""
        return "\n".join(r["text"] for r in self.records if r["event"] == "note")


def carry_out(arguments: list[str], kill: tuple[str, int] | None, errors: str) -> None:
    """For a process of its own: run the command line; die by SIGKILL when the `kill[1]`-th event
    called `kill[0]` is told, or at the `kill[1]`-th call of os.rename or os.replace."""
    from finespun.cli.app import run
    from finespun.training.progress import JsonLines

    torch.set_num_threads(1)
    for stream, path in ((sys.stdout, os.devnull), (sys.stderr, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    seen = 0

    def count(what: str) -> None:
        nonlocal seen
        seen += kill is not None and kill[0] == what
        if kill is not None and seen == kill[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    tell, rename, replace = JsonLines.tell, os.rename, os.replace

    def told(self: JsonLines, record: Any) -> None:
        tell(self, record)
        count(record["event"])

    def renamed(*paths: Any) -> None:
        count("before rename")
        rename(*paths)
        count("after rename")

    def replaced(*paths: Any) -> None:
        count("before replace")
        replace(*paths)
        count("after replace")

    JsonLines.tell, os.rename, os.replace = told, renamed, replaced  # type: ignore[method-assign]
    sys.exit(run(arguments))


def held_by_a_run(recipe: Recipe) -> int:
    """The most bytes that torch held at a time beyond those of before, in all steps of a run."""
    with surroundings(recipe):
        loop = prepare(recipe).loop()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            loop.run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
