"""What a run would come to, before it is one: targets, counts, memory, operations and time.

Nothing is written and nothing is kept: a few rows go forwards and backwards, then a few batches are
tried, optimiser step included, on a model and an adapter that are thrown away.
"""

import dataclasses
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from finespun.adapters.keys import spelt
from finespun.contract import SiteShape
from finespun.recipes.recipe import Recipe
from finespun.tasks.task import Encoded
from finespun.training.loop import Loop, train_mode
from finespun.training.progress import Reporter, as_json
from finespun.training.run import Job, prepare, surroundings
from finespun.training.trackers import check_installed

SMALL = (2, 3, 4)  # rows of small batches
FEW = 8  # rows that stand for a batch too large to be tried
WHOLE = 1 << 30  # bytes
PATIENCE = 2.0  # seconds to try batches for, the first of them apart
MOST = 8  # batches that are tried besides
STATES = 3  # of every trained parameter: its gradient and two moments

Clock = Callable[[], float]


@dataclass(frozen=True)
class Estimate:
    """What a recipe would do. Bytes and counts of the first group are exact, the rest estimates.

    `adapter_bytes`: the file of tensors. `weights`: bytes of the model and the adapter's
    parameters; `optimiser`: of gradients and moments; `activations`: the most that the passes of a
    batch of the longest rows hold at a time. `flops` and `tokens` (padding included) are of one
    step, forwards and backwards; `update_flops` of the updates in its forward passes. `seconds`: of
    all optimiser steps, and of what is looked at before the first; `measuring`: of measuring on the
    rows held out, once before and once after. Both come from batches that were tried.
    """

    targets: tuple[SiteShape, ...]
    modules: tuple[str, ...]
    num_update_parameters: int
    num_module_parameters: int
    adapter_bytes: int
    train_rows: int
    test_rows: int
    steps: int

    weights: int
    optimiser: int
    activations: int
    tokens: int
    flops: int
    update_flops: int
    seconds: float
    measuring: float
    device: str

    @property
    def memory(self) -> int:
        """Bytes of weights, optimiser and activations together."""
        return self.weights + self.optimiser + self.activations

    def as_json(self) -> str:
        """One JSON object; a target is its name, outputs, inputs and kind."""
        values = dataclasses.asdict(self)
        values["targets"] = [dataclasses.asdict(shape) for shape in self.targets]
        return as_json({**values, "memory": self.memory})


def estimate(
    recipe: Recipe, reporter: Reporter | None = None, clock: Clock = time.perf_counter
) -> Estimate:
    """Look at a recipe without carrying it out; `clock` returns seconds. Raises what `run` would
    raise up to its first step, except for the output folder, which is not touched."""
    check_installed(recipe.trackers)
    with surroundings(recipe):
        job = prepare(recipe, reporter)
        loop = job.loop()
        with train_mode(job.adapter):
            return _estimate(job, loop, clock)


def _estimate(job: Job, loop: Loop, clock: Clock) -> Estimate:
    adapter, epochs = job.adapter, job.recipe.training.epochs
    order = sorted(loop.batches.order(0), key=lambda rows: job.train.padded(rows))
    tokens = round(sum(job.train.padded(rows) for rows in order) * epochs / loop.steps)
    typical = Passes(job, _few(job, order[(len(order) - 1) // 2]))
    plan, held = adapter.attached.plan, spelt(adapter.attached.tensors())
    activations, flops = _activations(job), typical.flops()
    seconds = job.look.seconds + epochs * steps_time(
        job, loop, order, clock, whole=activations <= WHOLE
    )
    return Estimate(
        targets=plan.sites,
        modules=adapter.attached.trained,
        num_update_parameters=job.recipe.structure.total_parameters(plan),
        num_module_parameters=adapter.num_module_parameters,
        adapter_bytes=len(save(held, {"format": "finespun"})),
        train_rows=len(job.train),
        test_rows=len(job.test),
        steps=loop.steps,
        weights=bytes_of(weights_of(job)),
        optimiser=STATES * sum(p.nbytes for p in adapter.parameters()),
        activations=activations,
        tokens=tokens,
        flops=round(flops / typical.tokens * tokens),
        update_flops=sum(
            job.recipe.structure.flops(s, tokens, plan.choices[s.name]) for s in plan.sites
        ),
        seconds=seconds,
        measuring=_measuring(job, clock),
        device=str(next(adapter.model.parameters()).device),
    )


def _few(job: Job, rows: Sequence[int]) -> list[int]:
    """The longest of these rows, and the shortest: at most `FEW`."""
    lengths = job.train.lengths
    rows = sorted(rows, key=lengths.__getitem__, reverse=True)
    return rows[: FEW - 1] + rows[-1:] if len(rows) > FEW else rows


def _activations(job: Job) -> int:
    """Bytes that a batch of the longest rows holds, one short row among them so that there is
    padding. Three small batches show how they grow: with rows, and with their square where a batch
    is one row. A batch that needs no more than `WHOLE` is then measured whole, since a structure
    may multiply large batches in another way."""
    lengths = job.train.lengths
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    short, long = order[0], order[-1]
    rows = min(job.recipe.training.batch_size, len(lengths))

    def measured(count: int) -> int:
        return Passes(job, [long] * max(1, count - 1) + [short] * (count > 1)).memory()

    if rows > max(SMALL):
        two, three, four = map(measured, SMALL)
        bend = max(0, four - 2 * three + two) if job.train.packed else 0
        more = rows - SMALL[-1]
        grown = four + more * (four - two) // 2 + bend * more * (more + 2) // 2
        if grown > WHOLE:
            return grown
    return measured(rows)


# --- time ----------------------------------------------------------------------------------------
def steps_time(
    job: Job, loop: Loop, batches: Sequence[list[int]], clock: Clock, whole: bool
) -> float:
    """Seconds of an epoch of these batches: an optimiser step for each that is tried, `whole` or a
    few rows of it."""

    def seconds(rows: list[int]) -> float:
        part = rows if whole else _few(job, rows)
        started = clock()
        loop.take([job.task.collate(job.train, part)])
        if loop.device.type == "cuda":
            torch.cuda.synchronize(loop.device)
        loop.losses.clear()  # the next one is a first step again
        return (clock() - started) * job.train.padded(rows) / job.train.padded(part)

    found = tried(job.train, batches, seconds)
    loop.driver.close()
    return found


def _measuring(job: Job, clock: Clock) -> float:
    """Seconds of measuring on the rows held out, before training and after it."""

    def seconds(rows: list[int]) -> float:
        part = dataclasses.replace(job, test=job.test.take(rows))
        started = clock()
        part.measure()
        return clock() - started

    return 2 * tried(job.test, job.task.groups(job.test), seconds)


def tried(
    tokens: Encoded, batches: Sequence[list[int]], seconds: Callable[[list[int]], float]
) -> float:
    """Seconds of all `batches`, from some that are spread evenly from the smallest to the largest,
    scaled by their tokens. The smallest warms up; the middle one shows how many others there is
    `PATIENCE` for."""

    def size(rows: list[int]) -> int:
        return tokens.padded(rows)

    order = sorted(batches, key=size)
    seconds(order[0])
    middle = seconds(order[len(order) // 2])
    others = min(MOST, len(order) - 1, int(PATIENCE / max(middle, 1e-9)))
    count = 1 + others // 2 * 2
    chosen = [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]
    found = [middle if 2 * i + 1 == count else seconds(rows) for i, rows in enumerate(chosen)]
    return sum(found) / sum(map(size, chosen)) * sum(map(size, order))


# --- one batch, forwards and backwards -----------------------------------------------------------
class Passes:
    """A few rows as a batch, to go forwards and backwards; gradients are thrown away."""

    def __init__(self, job: Job, rows: Sequence[int]) -> None:
        self.job, self.model = job, job.adapter.model
        self.device = next(self.model.parameters()).device
        padded = job.task.collate(job.train, rows)
        self.batch = {name: tensor.to(self.device) for name, tensor in padded.items()}
        self.tokens = job.train.padded(rows)

    def run(self) -> int:
        """Both passes; returns the bytes of the gradients."""
        self.job.task.loss(self.model, self.batch).backward()
        size = 0
        for parameter in self.job.adapter.parameters():
            if parameter.grad is not None:
                size += parameter.grad.nbytes
                parameter.grad = None
        return size

    def memory(self) -> int:
        """The most bytes held at a time, the batch among them, gradients of the trained parameters
        left out."""
        held = Held([*weights_of(self.job), *self.batch.values()])
        with held:
            gradients = self.run()
        return max(0, held.most - gradients) + bytes_of(self.batch.values())

    def flops(self) -> int:
        """Floating point operations."""
        with FlopCounterMode(display=False) as counter:
            self.run()
        return counter.get_total_flops()


class Held(TorchDispatchMode):
    """Adds up the memory behind every tensor that operations make while it lives; `most` is the
    peak. Memory behind the `known` tensors does not count, nor what an operation uses inside."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = dict.fromkeys((t.untyped_storage().data_ptr() for t in known), 0)
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                for part in stored_in(tensor):
                    self._note(part.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self.live:
            self.live[place] = size
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._release, place)

    def _release(self, place: int) -> None:
        self.now -= self.live.pop(place)


def stored_in(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that have memory of their own: this one, or the parts of compressed rows."""
    if tensor.layout is torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return (tensor,)


def weights_of(job: Job) -> list[Tensor]:
    """All tensors of the model and of its adapter."""
    model = job.adapter.model
    return [*model.parameters(), *model.buffers(), *job.adapter.parameters()]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, shared memory once."""
    held = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())
