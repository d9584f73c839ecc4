"""Fold adapters into the base weights, and take them out again by a pointer swap."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from finespun.contract import Delta
from finespun.errors import InputError, StateError
from finespun.hosts.adapter_set import AdapterSet, Kept, Patch, adapter_set_of, alone
from finespun.hosts.attach import hosts_of, materialise
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.stored import Stored
from finespun.hosts.layers.tied import TiedDelta
from finespun.hosts.stack import inside
from finespun.hosts.states import check
from finespun.kernels.entries import entries_of, write_entries

Undo = Literal["memory", "entries", "none"]


@alone
def merge(
    model: nn.Module,
    wanted: str | Sequence[str] | Mapping[str, float],
    undo: Undo = "memory",
) -> int:
    """W ← W0 + Σ c_i (W_i − W0), in float32 at least, rounded once; returns the bytes kept.

    `wanted` are names with weights c_i, or names, whose weight is 1. undo="memory" writes into new
    tensors and keeps the old by pointer; undo="entries", for updates of few entries (SHiRA), writes
    these alone, in place, and keeps what stood there: both ways cost K writes and are exact;
    undo="none" adds in place, fastest for others, and cannot be undone.
    Raises StateError for adapters that cannot be merged so, for tied weights, and while adapters
    are merged already. An error on the way restores every weight.
    """
    adapter_set = adapter_set_of(model)
    if undo not in ("memory", "entries", "none"):
        raise InputError(f"undo={undo!r} is not known; try 'memory', 'entries' or 'none'")
    check(adapter_set, "merge")
    weights = dict(adapter_set.weights(wanted))
    for name in weights:
        materialise(model, name)
    hosts = {n: h for n, h in hosts_of(model).items() if any(w in h.held() for w in weights)}
    strengths = {name: w * adapter_set[name].strength for name, w in weights.items()}
    _check(model, hosts, weights)
    for name, host in hosts.items():
        for delta in (d for n, d in host.held().items() if n in weights):
            _check_finite(name, *delta.parameters())
    if undo == "entries":
        _check_sparse(hosts, weights)
    kept: dict[str, Kept] = {}
    try:
        with torch.no_grad():
            for name, host in hosts.items():
                kept[name] = stored = host.stored()
                before, after = _patches(host, stored, strengths) or (None, None)
                if before is not None and undo == "entries":
                    kept[name] = before
                _fold(host, stored, strengths, undo != "memory", after)
    except BaseException as error:
        if undo != "none":
            _put_back(hosts, kept)
            raise
        adapter_set.merged, adapter_set.broken = dict(weights), True
        raise StateError(
            f"merging in place stopped at {list(kept)[-1:]}: part of the weights is merged and "
            "cannot be taken back; reload the model"
        ) from error
    adapter_set.merged = dict(weights)
    if undo == "none":
        return 0
    adapter_set.kept = kept
    return sum(t.nbytes for held in kept.values() for t in _tensors(held) if t is not None)


@alone
def unmerge(model: nn.Module) -> None:
    """Put back the very tensors, or single entries, that stood before the merge. Tensors are put
    back whatever was done to the merged ones: such an edit, or a change of dtype, is lost.

    Raises StateError, and changes nothing, where somebody has edited entries that the merge wrote;
    an edit of other entries stays.
    """
    adapter_set = adapter_set_of(model)
    check(adapter_set, "unmerge")
    _take_out(hosts_of(model), adapter_set.kept or {})
    adapter_set.merged, adapter_set.kept = {}, None


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is its base, bit for bit, whatever is active or merged."""
    adapter_set = adapter_set_of(model)
    with adapter_set.guard():
        yield from _base_alone(model, adapter_set)


def _base_alone(model: nn.Module, adapter_set: AdapterSet) -> Iterator[None]:
    check(adapter_set, "disabled")
    before = adapter_set.active, adapter_set.rows, adapter_set.merged, adapter_set.kept
    hosts = hosts_of(model)
    merged = _take_out(hosts, adapter_set.kept) if adapter_set.kept is not None else {}
    aside = (merged, adapter_set.kept or {})
    adapter_set.active, adapter_set.rows, adapter_set.merged, adapter_set.kept = (), None, {}, None

    def end() -> None:
        _put_back(hosts, merged)
        adapter_set.active, adapter_set.rows, adapter_set.merged, adapter_set.kept = before
        adapter_set.settle_buffers()

    with inside(adapter_set.blocks, "disabled", end, aside=aside):
        adapter_set.settle_buffers()
        yield


def _put_back(hosts: dict[str, Host], kept: dict[str, Kept]) -> None:
    """Last first."""
    for name, held in reversed(kept.items()):
        hosts[name].put_back(held)


def _exchange(hosts: dict[str, Host], kept: dict[str, Kept]) -> dict[str, Kept]:
    """Likewise; the answer takes it back in turn."""
    return {name: hosts[name].exchange(held) for name, held in reversed(kept.items())}


def _tensors(kept: Kept) -> tuple[Tensor | None, ...]:
    return (kept.index, kept.values, kept.written) if isinstance(kept, Patch) else kept


def _take_out(hosts: dict[str, Host], kept: dict[str, Kept]) -> dict[str, Kept]:
    """Restore the weights, unless entries that the merge wrote are others now."""
    found = _exchange(hosts, kept)
    for name, held in kept.items():
        now, wanted = found[name], held.written if isinstance(held, Patch) else None
        if wanted is None or not isinstance(now, Patch) or _alike(now.values, wanted):
            continue
        _put_back(hosts, found)
        raise StateError(
            f"the weight of {name!r} was edited while "
            f"{', '.join(hosts[name].adapter_set.merged)} is merged into it: taking the "
            "update out would lose half of that edit. Undo the edit, or reload the model"
        )
    return found


def _alike(now: Tensor, wanted: Tensor) -> bool:
    """Equal in the present precision; what is no number is equal to itself."""
    wanted = wanted.to(now)
    return torch.equal(now, wanted) or torch.allclose(now, wanted, 0, 0, equal_nan=True)


def _check(model: nn.Module, hosts: dict[str, Host], weights: dict[str, float]) -> None:
    for name, host in hosts.items():
        if hasattr(host.layer._parameters.get("weight"), "full_tensor"):
            raise StateError(f"{name!r} is sharded over processes: merge before or after that")
        for adapter, delta in host.held().items():
            if adapter in weights and not delta.mergeable:
                raise StateError(
                    f"{adapter!r} adds around {name!r}, not into a weight: it cannot be merged"
                )
    _check_shared(model, hosts, weights)


def _check_shared(model: nn.Module, hosts: dict[str, Host], weights: dict[str, float]) -> None:
    """Raise StateError where a weight that several modules use would not get one and the same
    update for all of them."""
    uses: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses.setdefault(id(parameter), set()).add(id(module))
    for adapter in weights:
        reached: dict[int, set[int]] = {}
        first: dict[int, set[int]] = {}
        names: dict[int, str] = {}
        for name, host in hosts.items():
            delta, weight = host.held().get(adapter), id(host.layer._parameters.get("weight"))
            if delta is not None:
                names.setdefault(weight, name)
                reached.setdefault(weight, set()).add(id(host.layer))
                if not isinstance(delta, TiedDelta):
                    first.setdefault(weight, set()).add(id(host.layer))
        for weight, layers in reached.items():
            shared = uses.get(weight, layers)
            if len(shared) > 1 and (shared - layers or len(first.get(weight, ())) != 1):
                raise StateError(
                    f"{names[weight]!r} shares its weight with another module, which {adapter!r} "
                    "does not give the same update: untie them before merging them "
                    '(tie_word_embeddings=False), or adapt with tie="both"'
                )


def _check_sparse(hosts: dict[str, Host], weights: dict[str, float]) -> None:
    for name, host in hosts.items():
        held = host.held()
        for delta in (held[n] for n in weights if n in held):
            if not host.writable or _entries(delta) is None:
                raise StateError(
                    f"undo='entries' is for updates of few entries of a plain weight, which "
                    f"{type(delta).__name__} at {name!r} is not; try undo='memory'"
                )


def _entries(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """The few entries that are all this update moves."""
    return None if delta.adjusted or "map_bias" in delta.written else delta.sparse()


def _patches(host: Host, stored: Stored, strengths: dict[str, float]) -> tuple[Patch, Patch] | None:
    """The entries that the updates move: as they stand, and with their new values, added up in
    float32 at least and rounded once; None where one of the updates is dense."""
    held = host.held()
    here = [(held[n], c) for n, c in strengths.items() if n in held and not held[n].dead]
    if not here:
        return None
    found = [(_entries(d), c) for d, c in here]
    moves = [(*move, c) for move, c in found if move is not None]
    if len(moves) < len(here):
        return None
    index = moves[0][0] if len(moves) == 1 else torch.cat([at for at, _, _ in moves]).unique()
    before = entries_of(host.read(stored), index)
    values = before.to(torch.promote_types(before.dtype, torch.float32))
    for at, move, c in moves:
        move = move.to(values.dtype)
        if at is index:
            values = values.add(move, alpha=c)
        else:
            values = values.index_add(0, torch.searchsorted(index, at), move, alpha=c)
    after = values.to(before.dtype)
    return Patch(index, before, after), Patch(index, after)


def _fold(
    host: Host,
    stored: Stored,
    strengths: dict[str, float],
    in_place: bool,
    patch: Patch | None,
) -> None:
    held = host.held()
    active = [
        (held[name], c)
        for name, c in strengths.items()
        if name in held and not isinstance(held[name], TiedDelta) and not held[name].dead
    ]
    if not active:
        return
    weight, bias = host.read(stored), host.read_bias(stored)
    plain = in_place and host.writable
    if patch is not None:
        W = weight if plain else weight.clone()
        write_entries(W, patch.index, patch.values)
        if not plain:
            host.write(W)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight if plain and weight.dtype == wide else weight.to(wide)
    own = plain and total is weight
    for delta, c in active:
        pair = delta.factors()
        if not in_place:
            _check_finite(host.name, *(pair or ()))
        if pair is None:
            change = delta.dense(delta.base_weight())
            if not in_place:
                _check_finite(host.name, change)
            change = change.to(wide)
            total = total.add_(change, alpha=c) if own else total.add(change, alpha=c)
        else:
            add = total.addmm_ if own else total.addmm
            total = add(pair[1].to(wide), pair[0].to(wide), alpha=delta.scale * c)
        own = own or total is not weight
    moves = [m * c for delta, c in active if (m := delta.bias_change()) is not None]
    moved = None if not moves or bias is None else (bias.to(wide) + sum(moves)).to(bias.dtype)
    if plain:
        if total is not weight:
            weight.copy_(total)
        if moved is not None and bias is not None:
            bias.copy_(moved)
        return
    host.write(total.to(weight.dtype), moved)


def _check_finite(name: str, *tensors: Tensor) -> None:
    """Raise StateError for NaN or infinity in an update; sums are looked at first."""
    for tensor in tensors:
        if (
            not tensor.is_meta
            and not torch.isfinite(tensor.sum())
            and not torch.isfinite(tensor).all()
        ):
            raise StateError(
                f"the update at {name!r} holds NaN or infinity, which would go into the "
                "weight: nothing is merged"
            )
