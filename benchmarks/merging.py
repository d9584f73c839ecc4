"""Folding an adapter into the weights: in place, and with the old weights kept for undoing it.

In place there is one product per layer, W += s·B A, and nothing else to do; the bare products are
timed beside it as the floor. On memory used before, PEFT's way costs two to three such products, so
no way of merging can be three times as fast there.
"""

import torch

import finespun as fs
from benchmarks import memory
from benchmarks.measure import Line, report, timed
from benchmarks.models import pair, same
from finespun import hosts

WIDTH, LAYERS, RANK = 768, 8, 16


def measure() -> list[Line]:
    """Against `merge_adapter` without and with `safe_merge`."""
    ours, theirs = pair(WIDTH, LAYERS, RANK)
    adapter = fs.Adapter(ours, "default")
    names = list(adapter.deltas)
    base = theirs.base_model.model
    kept = {n: ours.get_submodule(n).weight.detach().clone() for n in names}
    adapter.merge(undo="none")
    theirs.merge_adapter()
    for n in names:
        same(ours.get_submodule(n).weight, base.get_submodule(n).base_layer.weight, n)

    def back() -> None:
        adapter_set = hosts.adapter_set_of(ours)
        adapter_set.merged, adapter_set.kept = {}, None
        with torch.no_grad():
            for name, weight in kept.items():
                ours.get_submodule(name).weight.copy_(weight)

    def theirs_back() -> None:
        theirs.unmerge_adapter()

    back()
    theirs_back()

    def bare() -> None:
        with torch.no_grad():
            for name, delta in adapter.deltas.items():
                A, B = delta.factors()
                ours.get_submodule(name).weight.addmm_(B, A, alpha=delta.scale)

    plainly = (
        {"ours": lambda: adapter.merge(undo="none"), "PEFT": theirs.merge_adapter, "bare": bare},
        {"ours": back, "PEFT": theirs_back, "bare": back},
    )
    safely = (
        {"ours": adapter.merge, "PEFT": lambda: theirs.merge_adapter(safe_merge=True)},
        {"ours": adapter.unmerge, "PEFT": theirs_back},
    )
    shape = f"{len(names)} layers of width {WIDTH}, rank {RANK}"
    fresh, warm = (
        f"{shape}; on fresh memory, as a first merge is",
        f"{shape}; on memory used before",
    )
    lines = []
    for name, work in (("merge in place", plainly), ("merge, undo kept", safely)):
        found = timed(*work, before=memory.give_back)
        lines.append(Line.of(name, found, note=fresh))
        if work is plainly:
            lines.append(Line.of(f"{name}, the floor", found, "bare", note="rival: bare products"))
        with memory.kept():
            lines.append(Line.of(f"{name}, again", timed(*work), note=warm))
    return lines


if __name__ == "__main__":
    report(measure)
