"""Fold adapters into the base weights, and take them out again by a pointer swap."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from finespun.errors import InputError, StateError
from finespun.hosts.attach import board_of, hosts_of, materialise
from finespun.hosts.board import Board
from finespun.hosts.host import Host, Stored
from finespun.hosts.mirror import Mirror
from finespun.hosts.parts import PartHost

Undo = Literal["memory", "none"]


def merge(model: nn.Module, weights: dict[str, float], undo: Undo = "memory") -> int:
    """W ← W0 + Σ c_i (W_i − W0), computed in float32 and rounded once; returns the bytes kept.

    undo="memory" writes into new tensors and keeps the old by pointer; undo="none" adds in place,
    fastest, and cannot be undone. Raises StateError for adapters that cannot be merged, for tied
    weights, and while adapters are merged already. An error on the way restores every weight.
    """
    board = board_of(model)
    if undo not in ("memory", "none"):
        raise InputError(f"undo={undo!r} is not known; try 'memory' or 'none'")
    if board.merged:
        raise StateError(f"{', '.join(board.merged)} is merged already; unmerge first")
    for name in weights:
        materialise(model, board[name])
    hosts = {n: h for n, h in hosts_of(model).items() if any(w in h.held() for w in weights)}
    strengths = {name: w * board[name].scale for name, w in weights.items()}
    _check(model, hosts, weights)
    kept: dict[str, Stored] = {}
    try:
        with torch.no_grad():
            for name, host in hosts.items():
                kept[name] = host.stored()
                _fold(host, kept[name], strengths, in_place=undo == "none")
    except BaseException as error:
        if undo == "memory":
            _restore(hosts, kept)
            raise
        board.merged = dict(weights)
        raise StateError(
            f"merging in place stopped at {list(kept)[-1:]}: part of the weights is merged and "
            "cannot be taken back; reload the model"
        ) from error
    board.merged = dict(weights)
    if undo == "none":
        return 0
    board.kept = kept
    return sum(t.nbytes for stored in kept.values() for t in stored if t is not None)


def unmerge(model: nn.Module) -> None:
    """Put back the very tensors that stood before the merge."""
    board = board_of(model)
    if not board.merged:
        raise StateError("nothing is merged")
    if board.kept is None:
        raise StateError(
            "merged with undo='none': the base weights were not kept; reload the model"
        )
    _restore(hosts_of(model), board.kept)
    board.merged, board.kept = {}, None


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is its base, bit for bit, whatever is active or merged."""
    board = board_of(model)
    with board.guard():
        yield from _base_alone(model, board)


def _base_alone(model: nn.Module, board: Board) -> Iterator[None]:
    before = board.active, board.rows, board.merged, board.kept
    hosts = hosts_of(model)
    merged: dict[str, Stored] = {}
    if board.merged:
        if board.kept is None:
            raise StateError("merged with undo='none': the base cannot be shown; reload the model")
        merged = {n: hosts[n].stored() for n in board.kept}
        _restore(hosts, board.kept)
    board.active, board.rows, board.merged, board.kept = (), None, {}, None
    try:
        yield
    finally:
        _restore(hosts, merged)
        board.active, board.rows, board.merged, board.kept = before


def _restore(hosts: dict[str, Host], kept: dict[str, Stored]) -> None:
    for name, stored in reversed(kept.items()):
        hosts[name].restore(stored)


def _check(model: nn.Module, hosts: dict[str, Host], weights: dict[str, float]) -> None:
    uses = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    own = {name: id(host.layer._parameters.get("weight")) for name, host in hosts.items()}
    reached = Counter(own.values())
    for name, host in hosts.items():
        for adapter, delta in host.held().items():
            if adapter in weights and not delta.mergeable:
                raise StateError(
                    f"{adapter!r} adds around {name!r}, not into a weight: it cannot be merged"
                )
        weight = own[name]
        if uses[weight] > reached[weight] and not isinstance(host, PartHost):
            raise StateError(
                f"{name!r} shares its weight with another module: untie them before merging "
                'them (tie_word_embeddings=False), or adapt with tie="both"'
            )


def _fold(host: Host, stored: Stored, strengths: dict[str, float], in_place: bool) -> None:
    held = host.held()
    active = [
        (held[name], c)
        for name, c in strengths.items()
        if name in held and not isinstance(held[name], Mirror)
    ]
    if not active:
        return
    weight, bias = host.read(stored), stored[1]
    plain = in_place and host.writable
    total = weight if plain and weight.dtype == torch.float32 else weight.float()
    own = plain and total is weight
    for delta, c in active:
        pair = delta.factors()
        if pair is None:
            change = delta.dense(delta.base_weight())
            total = total.add_(change, alpha=c) if own else total.add(change, alpha=c)
        else:
            add = total.addmm_ if own else total.addmm
            total = add(pair[1], pair[0], alpha=delta.scale * c)
        own = own or total is not weight
    moves = [m * c for delta, c in active if (m := delta.bias_change()) is not None]
    moved = None if not moves or bias is None else (bias.float() + sum(moves)).to(bias.dtype)
    if plain:
        if total is not weight:
            weight.copy_(total)
        if moved is not None and bias is not None:
            bias.copy_(moved)
        return
    host.write(total.to(weight.dtype), moved)
