"""Proof that a change moved no bits: training before and after it ends with the same parameters.

`python tests/unmoved.py [REVISION] [--quick]` trains every case of the suite, and one real recipe
unless `--quick`, in a worktree of REVISION and in the tree this file lies in, each in a process of
its own. It prints a line for whatever differs, and fails where that is not ON_PURPOSE.

Of a tree it uses `suite.CASES`, `suite.adapted`, `suite.batch`, the command line and one example:
modules, classes, parameters and files' keys may be renamed between the two.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

# A case, or a part of the recipe, and why it differs.
ON_PURPOSE: dict[str, str] = {
    "lsr-official": "the official start has the sides of the official code",
    "lsr-shadow": "the same start",
    "recipe: adapter": "its head learns at a rate of its own, 3e-3, and no longer at the updates'",
    "recipe: metrics": "the head's own rate; the loss on held-out rows is measured; the whole task",
}

BEFORE = "32097f2"  # version 0.1
STEPS = 20
RECIPE = "examples/trec-lsr-small.yaml"
PASSING = {"output", "seconds", "peak_memory", "adapter_bytes"}  # metrics that no two runs share
ROOT = Path(__file__).resolve().parent.parent
COMMAND = "from finespun.cli import main; main()"

Found = dict[str, Any]


def digest(tensor: Tensor) -> str:
    """The shape, dtype and bytes of a tensor as one text."""
    plain = tensor.detach().cpu().contiguous()
    held = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{tuple(plain.shape)} {plain.dtype} {held.hexdigest()}"


def digests(tensors: Sequence[Tensor]) -> list[str]:
    """The texts of tensors, in an order that no name decides."""
    return sorted(map(digest, tensors))


def trained(case: Any) -> Found:
    """A case's numbers, output and losses after a few steps of AdamW."""
    import suite

    torch.manual_seed(0)
    model, _ = suite.adapted(case, train=("head",))
    model.train()
    moved = [p for p in model.parameters() if p.requires_grad]
    start = digests(moved)
    optimizer = torch.optim.AdamW(moved, lr=1e-2, weight_decay=0.01)
    x, losses = suite.batch(), []
    labels = torch.arange(len(x), device=x.device)
    for _ in range(STEPS):
        output = model(x)
        loss = F.cross_entropy(output, labels % output.shape[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()).hex())
    return {"start": start, "end": digests(moved), "losses": losses, "output": digest(model(x))}


def carried_out(tree: Path) -> dict[str, Found]:
    """What the tree's recipe wrote: the adapter's tensors, and the metrics, as sorted values."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-c", COMMAND, "train", str(tree / RECIPE), "--quiet"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        [adapter] = Path(folder).rglob("adapter.safetensors")
        told = json.loads(adapter.with_name("metrics.json").read_text(encoding="utf-8"))
        lasting = [value for key, value in told.items() if key not in PASSING]
        return {
            "recipe: adapter": {"tensors": digests(list(load_file(adapter).values()))},
            "recipe: metrics": {"values": sorted(leaves(lasting))},
        }


def leaves(value: Any) -> Iterator[str]:
    """Every value in nested lists and objects, as JSON."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield json.dumps(value)


def measure(tree: Path, quick: bool, file: Path) -> None:
    """Train all of a tree's cases, and its recipe unless `quick`; write what came of it."""
    for name in ("finespun", "suite"):
        found = importlib.util.find_spec(name)
        if found is None or not Path(found.origin or "").is_relative_to(tree):
            raise RuntimeError(f"{name} does not come from {tree}")
    import suite

    torch.set_num_threads(1)
    result = {case.name: trained(case) for case in suite.CASES}
    if not quick:
        result |= carried_out(tree)
    file.write_text(json.dumps(result), encoding="utf-8")


def measured(tree: Path, quick: bool, file: Path) -> dict[str, Found]:
    """`measure` in a process of its own, which imports the package and the suite of that tree."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--tree", str(tree)]
    command += ["--into", str(file), *(["--quick"] if quick else [])]
    paths = os.pathsep.join([str(tree), str(tree / "tests")])
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(command, env={**os.environ, **threads, "PYTHONPATH": paths}, check=True)
    return json.loads(file.read_text(encoding="utf-8"))


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """The tree of a revision, in a new folder that git forgets afterwards."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def differences(before: dict[str, Found], after: dict[str, Found]) -> dict[str, str]:
    """Case -> what differs. A case that is new has nothing to be compared with."""
    found = {}
    for name, old in before.items():
        new = after.get(name)
        if new is None:
            found[name] = "is gone"
        elif parts := [part for part in old if old[part] != new[part]]:
            found[name] = f"differs in {', '.join(parts)}"
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare both trees; 1 where something differs that is not ON_PURPOSE."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision", nargs="?", default=BEFORE, help="the tree of before")
    parser.add_argument("--quick", action="store_true", help="leave the real recipe out")
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.tree:
        measure(asked.tree, asked.quick, asked.into)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        with worktree(asked.revision, folder / "tree") as tree:
            before = measured(tree, asked.quick, folder / "before.json")
        after = measured(ROOT, asked.quick, folder / "after.json")
    found = differences(before, after)
    for name, told in found.items():
        why = f", on purpose: {ON_PURPOSE[name]}" if name in ON_PURPOSE else ""
        print(f"{name} {told}{why}")
    moved = found.keys() - ON_PURPOSE.keys()
    equal, new = len(before) - len(found), len(after.keys() - before.keys())
    print(f"{equal} of {len(before)} equal to {asked.revision}, {len(moved)} moved, {new} new")
    return int(bool(moved))


if __name__ == "__main__":
    sys.exit(main())
