"""The 24th adapter: loading it from disk, and switching to it."""

import itertools
import tempfile
from pathlib import Path

import torch

import finespun as fs
from benchmarks.measure import Line, report, timed
from benchmarks.models import hidden, pair, same, tokens
from finespun import files

WIDTH, LAYERS, RANK, COUNT = 256, 8, 16, 24


def measure() -> list[Line]:
    """Both sides read their own files; a loaded adapter is active and ready to run."""
    names = [f"n{i}" for i in range(COUNT - 1)]
    ours, theirs = pair(WIDTH, LAYERS, RANK, names)
    with tempfile.TemporaryDirectory() as place:
        own, peft = Path(place) / "own", Path(place) / "peft"
        fs.Adapter(ours, names[0]).save(own)
        theirs.save_pretrained(str(peft), selected_adapters=[names[0]])
        peft = peft / names[0]

        def load() -> None:
            fs.load(ours, own, name="last")

        def register() -> None:
            files.register_saved(ours, files.read_adapter(own).named("last"))

        def load_theirs() -> None:
            theirs.load_adapter(str(peft), "last")
            theirs.set_adapter("last")

        def forget() -> None:
            fs.Adapter(ours, "last").detach()

        load()
        load_theirs()
        for model in (ours, theirs):
            model.eval()
        with torch.no_grad():
            same(hidden(ours, tokens(2, 16)), hidden(theirs, tokens(2, 16)), "hidden states")
        turns = {side: itertools.cycle([names[3], "last"]) for side in ("ours", "PEFT")}
        switched = timed(
            {
                "ours": lambda: fs.activate(ours, next(turns["ours"])),
                "PEFT": lambda: theirs.set_adapter(next(turns["PEFT"])),
            }
        )
        forget()
        theirs.delete_adapter("last")
        undo = {"ours": forget, "PEFT": lambda: theirs.delete_adapter("last"), "flat": forget}
        loaded = timed({"ours": load, "PEFT": load_theirs, "flat": register}, undo)
    sites = 7 * LAYERS
    note = f"{sites} layers of width {WIDTH}, rank {RANK}, {COUNT - 1} adapters there already"
    return [
        Line.of("load the 24th adapter", loaded, note=f"{note}; loaded and active on both sides"),
        Line.of(
            "register the 24th adapter",
            loaded,
            note="read and checked by us, its modules made when first used",
            ours="flat",
        ),
        Line.of("switch among 24 adapters", switched, note=note),
    ]


if __name__ == "__main__":
    report(measure)
