"""What a run would come to, before it is one: targets, counts, memory, operations and time.

Nothing is trained and nothing is written: a few rows go forwards and backwards, no optimiser
exists, and gradients are thrown away.
"""

import dataclasses
import statistics
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from finespun import hosts
from finespun.recipe import Recipe
from finespun.structures import SiteShape
from finespun.train.lm_text import AnswerTokens
from finespun.train.loop import steps_of, train_mode
from finespun.train.progress import Reporter, as_json
from finespun.train.run import Job, prepare, surroundings
from finespun.train.text import Batches
from finespun.train.trackers import check_installed

SMALL = (2, 3, 4)  # rows of small batches
TIMED = 8  # rows of the batch that is timed
WHOLE = 1 << 30  # bytes
STATES = 3  # of every trained number: its gradient and two moments


@dataclass(frozen=True)
class Estimate:
    """What a recipe would do. Bytes and counts of the first group are exact, the rest estimates.

    `adapter_bytes`: the file of tensors. `weights`: bytes of the model and the adapter's numbers;
    `optimiser`: of gradients and moments; `activations`: the most that the passes of a batch of the
    longest rows hold at a time. `flops` and `tokens` (padding included) are of one step, forwards
    and backwards; `update_flops` of the updates in its forward passes. `seconds`: of all steps,
    from one that was timed.
    """

    targets: tuple[SiteShape, ...]
    modules: tuple[str, ...]
    update_numbers: int
    module_numbers: int
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


def estimate(recipe: Recipe, reporter: Reporter | None = None) -> Estimate:
    """Look at a recipe without training. Raises what `run` would raise before its first step,
    except for the output folder, which is not touched."""
    check_installed(recipe.trackers)
    with surroundings(recipe):
        job = prepare(recipe, reporter)
        with train_mode(job.adapter):
            return _estimate(job)


def _estimate(job: Job) -> Estimate:
    adapter, training = job.adapter, job.recipe.training
    batches = Batches(job.text.tokenizer, job.train, training.batch_size, seed=training.seed)
    lengths = job.train.lengths
    sizes = [_size(job, [lengths[i] for i in rows]) for rows in batches.order(0)]
    steps = steps_of(len(batches), training)
    tokens = round(sum(sizes) * training.epochs / steps)
    typical = Passes(job, _typical(batches, lengths))
    plan, held = adapter.entry.plan, hosts.tensors_of(adapter.entry)
    return Estimate(
        targets=plan.sites,
        modules=adapter.entry.trained,
        update_numbers=adapter.num_parameters,
        module_numbers=adapter.num_trained,
        adapter_bytes=len(save(held, {"format": "finespun"})),
        train_rows=len(job.train),
        test_rows=len(job.test),
        steps=steps,
        weights=bytes_of(weights_of(job)),
        optimiser=STATES * sum(p.nbytes for p in adapter.parameters()),
        activations=_activations(job),
        tokens=tokens,
        flops=round(typical.flops() / typical.tokens * tokens),
        update_flops=sum(job.recipe.structure.flops(shape, tokens) for shape in plan.sites),
        seconds=typical.seconds() / typical.tokens * tokens * steps,
        device=str(next(adapter.model.parameters()).device),
    )


def _packs(job: Job) -> bool:
    """Whether a batch is one long row, without padding."""
    return isinstance(job.train, AnswerTokens) and job.train.pack


def _size(job: Job, lengths: Sequence[int]) -> int:
    """Tokens of a batch of rows of these lengths, padding included."""
    return sum(lengths) if _packs(job) else len(lengths) * max(lengths)


def _typical(batches: Batches, lengths: Sequence[int]) -> list[int]:
    """A few rows of the batch whose length is the median."""
    longest = [(max(lengths[i] for i in rows), rows) for rows in batches.order(0)]
    middle = statistics.median_low(length for length, _ in longest)
    rows = next(rows for length, rows in longest if length == middle)
    rows = sorted(rows, key=lengths.__getitem__, reverse=True)
    return rows[: TIMED - 1] + rows[-1:] if len(rows) > TIMED else rows


def _activations(job: Job) -> int:
    """Bytes that a batch of the longest rows holds, one short row among them so that there is
    padding. Three small batches tell how they grow: with rows, and with their square where a batch
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
        bend = max(0, four - 2 * three + two) if _packs(job) else 0
        more = rows - SMALL[-1]
        grown = four + more * (four - two) // 2 + bend * more * (more + 2) // 2
        if grown > WHOLE:
            return grown
    return measured(rows)


# --- one batch, forwards and backwards -----------------------------------------------------------
class Passes:
    """A few rows as a batch, to go forwards and backwards; gradients are thrown away."""

    def __init__(self, job: Job, rows: Sequence[int]) -> None:
        self.job, self.model = job, job.adapter.model
        self.device = next(self.model.parameters()).device
        padded = job.train.collate(job.text.tokenizer, rows)
        self.batch = {name: tensor.to(self.device) for name, tensor in padded.items()}
        self.tokens = padded["input_ids"].numel()

    def run(self) -> int:
        """Both passes; returns the bytes of the gradients."""
        self.model(**self.batch).loss.backward()
        size = 0
        for parameter in self.job.adapter.parameters():
            if parameter.grad is not None:
                size += parameter.grad.nbytes
                parameter.grad = None
        return size

    def memory(self) -> int:
        """The most bytes held at a time, the batch among them, gradients of the trained numbers
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

    def seconds(self) -> float:
        """Time of the second of two runs."""
        for _ in range(2):
            started = time.perf_counter()
            self.run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


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
                self._note(tensor.untyped_storage())
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


def weights_of(job: Job) -> list[Tensor]:
    """All tensors of the model and of its adapter."""
    model = job.adapter.model
    return [*model.parameters(), *model.buffers(), *job.adapter.parameters()]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, shared memory once."""
    held = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())
