"""Write the folders beside this file with the Finespun that is imported, and what it computes.

    PYTHONPATH=<the tree of that version> python make.py

One folder for each minor version: a sub-folder for each structure that it registers and for each
thing that a file can hold besides, and `outputs.safetensors`. The suite of that tree is used.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import finespun as fs

HERE = Path(__file__).parent
TREE = Path(fs.__file__).parents[1]
sys.path.insert(0, str(TREE / "tests"))

from suite import CASES, Case, batch, stirred  # noqa: E402

from finespun.structures import STRUCTURES  # noqa: E402

NAMED = {case.name: case for case in CASES}


def registered() -> dict[str, Case]:
    """Kind -> the first case of the class that is registered under it."""
    return {
        kind: next(case for case in CASES if type(case.structure) is made)
        for kind, made in sorted(STRUCTURES.items())
    }


def gated(adapter: fs.Adapter) -> None:
    for delta in adapter.deltas.values():
        delta.set_gate(torch.tensor([0.5, 0.0, 2.0]))


def switched_off(adapter: fs.Adapter) -> None:
    first, second, *_ = adapter.deltas.values()
    first.switch_off(first.groups("rank")[1])
    for group in second.groups("rank"):
        second.switch_off(group)


def compacted(adapter: fs.Adapter) -> None:
    first, second, *_ = adapter.deltas.values()
    first.switch_off(first.groups("term")[1])
    second.switch_off(second.groups("term")[-1])
    adapter.compact()


def compacted_to_lora(adapter: fs.Adapter) -> None:
    first = next(iter(adapter.deltas.values()))
    first.set_gate(torch.tensor([1.0, 0.0, -0.5, 2.0]))
    adapter.compact()


def weakened(adapter: fs.Adapter) -> None:
    adapter.scale = 0.7


def nothing(adapter: fs.Adapter) -> None:
    pass


# folder: the case, modules trained whole, and what is done to the adapter before it is saved
BESIDES: dict[str, tuple[str, tuple[str, ...], Callable[[fs.Adapter], None]]] = {
    "with_head": ("lora", ("head",), nothing),
    "with_strength": ("lora", (), weakened),
    "with_exact_start": ("lsr-shadow", (), nothing),
    "with_exact_start_of_bank": ("unilora-shadow", (), nothing),
    "with_gate": ("lora", (), gated),
    "with_ranks_off": ("lora", (), switched_off),
    "compacted": ("lsr", (), compacted),
    "compacted_to_lora": ("lsr", (), compacted_to_lora),
}


def main() -> None:
    minor = HERE / ".".join(fs.__version__.split(".")[:2])
    wanted = {kind: (case, (), nothing) for kind, case in registered().items()}
    wanted |= {name: (NAMED[case], *rest) for name, (case, *rest) in BESIDES.items()}
    outputs = {}
    for name, (case, train, change) in wanted.items():
        model, adapter = stirred(case, train=train)
        change(adapter)
        adapter.save(minor / name)
        (minor / name / "README.md").unlink()
        with torch.no_grad():
            outputs[name] = model(batch())
    save_file(outputs, minor / "outputs.safetensors")


main()
