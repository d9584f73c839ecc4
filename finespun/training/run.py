"""One run, from recipe to result: check, load, adapt, train, measure, save."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finespun.adapter import Adapter, adapt
from finespun.contract import AxisValue
from finespun.driver import Look, check
from finespun.errors import InputError
from finespun.files import Lineage, lineage_of, save
from finespun.models import Loaded
from finespun.recipes.recipe import Recipe
from finespun.recipes.training import Training
from finespun.storage.atomic import check_writable
from finespun.storage.lock import locked
from finespun.tasks.batches import Batches
from finespun.tasks.task import Encoded, Limits, Task
from finespun.training.checkpoint import (
    checkpoints,
    last_whole,
    random_state,
    save_checkpoint,
    set_random_state,
)
from finespun.training.look import look
from finespun.training.loop import Loop, steps_of
from finespun.training.output import (
    ADAPTER,
    CHECKPOINT,
    LOG,
    RECIPE,
    RESULT,
    Result,
    begin,
    check_place,
    claim,
    disk_needed,
    peak_memory,
    room_of,
)
from finespun.training.progress import Log, Reporter, Several
from finespun.training.trackers import check_installed, followed


@dataclass(frozen=True)
class Job:
    """Everything that a recipe asks for, loaded and adapted, before the first step."""

    recipe: Recipe
    task: Task[Any, Any]
    text: Loaded
    adapter: Adapter
    train: Encoded
    test: Encoded
    look: Look

    def measure(self) -> dict[str, float]:
        """Metrics on the held-out rows."""
        return self.task.measure(self.text, self.test)

    @property
    def plan_key(self) -> str:
        """A hash of what the structure chose for every layer."""
        return _hash({name: dict(one) for name, one in self.adapter.attached.plan.choices.items()})

    def loop(self, reporter: Reporter | None = None, **options: Any) -> Loop:
        """The training loop of this recipe, at its start."""
        training = self.recipe.training
        return Loop(
            self.adapter,
            self.batches(),
            training,
            self.recipe.lr,
            reporter,
            hooks=self.values,
            head_lr=self.recipe.head_lr,
            measured=self.look,
            **options,
        )

    def batches(self) -> Batches:
        """The rows to train on, from the first step's."""
        training = self.recipe.training
        return Batches(self.task, self.train, training.batch_size, seed=training.seed)

    @property
    def values(self) -> list[AxisValue]:
        """The recipe's values of the axes beside the structure."""
        return [v for v in self.recipe.values.values() if isinstance(v, AxisValue)]

    def check(self) -> None:
        """Raise InputError where a value of an axis cannot do its work in this run."""
        steps = steps_of(len(self.batches()), self.recipe.training)
        check(self.adapter.model, self.adapter.name, self.values, steps)

    def settle(self) -> None:
        """After training: remove what is switched off, or never woke."""
        if any(delta.dead or delta.masks() for delta in self.adapter.deltas.values()):
            self.adapter.compact()


def run(
    recipe: Recipe,
    resume: bool = False,
    reporter: Reporter | None = None,
    overwrite: bool = False,
) -> Result:
    """Carry out a recipe and return what it came to; the output folder then holds the adapter,
    recipe.yaml, metrics.json and metrics.jsonl.

    With `resume` an interrupted run goes on from its last checkpoint and ends with the adapter, bit
    for bit, of a run that was never interrupted; a finished one is not repeated. `overwrite` starts
    anew where the folder holds a run or an adapter, which is refused otherwise; a model or another
    format's adapter is always refused, and a README.md of the user's own stays. What can be wrong
    is looked for before training. A folder has one run at a time. What it held before stays whole
    until the new adapter, recipe and figures take its place, all in one moment. Raises InputError,
    FileError, TrainingError; Interrupted after Ctrl-C or SIGTERM.
    """
    reporter = reporter or Reporter()
    folder = Path(recipe.output).expanduser()
    check_installed(recipe.trackers)
    try:
        check_place(folder, recipe.output)
        with locked(folder, "a run"):
            if (found := claim(folder, recipe, resume, overwrite)) is not None:
                return found
            with surroundings(recipe):
                return _run(recipe, folder, resume, reporter)
    finally:
        reporter.close()


def _run(recipe: Recipe, folder: Path, resume: bool, reporter: Reporter) -> Result:
    job = prepare(recipe, reporter)
    check_writable(folder / CHECKPOINT, disk_needed(job.adapter))
    kept = resume and checkpoints(folder / CHECKPOINT)
    state, damaged = last_whole(folder / CHECKPOINT) if kept else (None, [])
    for text in damaged:
        reporter.tell({"event": "note", "text": f"warning: {text}; the checkpoint before is taken"})
    if state is None:
        begin(folder, recipe)
    log = Log(room_of(folder) / LOG)
    if state is not None:
        _check_same(job, state, folder)
        log.cut(state["log"])
    with followed(recipe, log.past()) as trackers:
        loop, before, after = _trained(job, state, Several(reporter, log, trackers), log)
    for line in job.task.show(job.text, job.test, job.adapter.disabled):
        Several(reporter, log).tell({"event": "note", "text": line})
    result: list[Result] = []

    def beside(work: Path) -> None:
        result.append(_result(job, loop, before, after, work))
        (work / RECIPE).write_text(recipe.dump(), encoding="utf-8")
        (work / RESULT).write_text(result[0].as_json() + "\n", encoding="utf-8")
        shutil.copyfile(log.path, work / LOG)

    made_by = lineage(recipe, after, job.task)
    save(job.adapter.model, job.adapter.name, folder, made_by, beside)
    shutil.rmtree(folder / CHECKPOINT)
    return result[0]


def _trained(
    job: Job, state: dict[str, Any] | None, teller: Reporter, log: Log
) -> tuple[Loop, dict[str, float], dict[str, float]]:
    """The loop after its last step, and the metrics before and after it; `state` is where to go on
    from."""
    checkpoint = Path(job.recipe.output).expanduser() / CHECKPOINT
    before = job.measure() if state is None else state["before"]
    if state is None:
        teller.tell({"event": "evaluation", "when": "before", "metrics": before})
    threads = torch.get_num_threads() if state is None else state["threads"]
    about = {"before": before, "threads": threads, "data": job.train.key, "plan": job.plan_key}

    def save(loop_state: dict[str, Any]) -> None:
        save_checkpoint(checkpoint, {**about, "log": log.size, **loop_state})

    loop = job.loop(teller, save=save)
    torch.manual_seed(job.recipe.training.seed)
    if state is not None:
        loop.load_state_dict(state)
        teller.tell({"event": "note", "text": _resumed(loop, state)})
    loop.run()
    job.settle()
    after = job.measure()
    teller.tell({"event": "evaluation", "when": "after", "metrics": after})
    return loop, before, after


def prepare(recipe: Recipe, reporter: Reporter | None = None) -> Job:
    """Load data and model and attach the adapter: all that can be refused is refused here."""
    reporter = reporter or Reporter()
    task = recipe.data.choose()
    rows = task.read(recipe.data.source)
    task = task.settled(rows.train)
    model = task.load(recipe.model, recipe.training.seed)
    model.model.to(choose_device(recipe.training.device))
    limits = limits_of(recipe.training)
    train, test = (task.encode(model, part, limits) for part in (rows.train, rows.test))
    seen = look(recipe, task, model, train)
    adapter = attach(recipe, model, seen)
    notes = [rows.report] if rows.repeated or rows.unused else []
    notes += [train.report] if train.cut else []
    if not recipe.structure.starts_at_zero and adapter.deltas:
        moved = max(adapter.norms().values())
        notes.append(f"this structure does not start at the base: ‖ΔW‖ up to {moved:.3g}")
    untrained = [n for n in model.fresh if n not in adapter.attached.trained]
    if untrained:
        notes.append(
            f"{', '.join(untrained)} starts untrained and remains untrained: add it to train"
        )
    for note in notes:
        reporter.tell({"event": "note", "text": note})
    job = Job(recipe, task, model, adapter, train, test, seen)
    job.check()
    return job


def limits_of(training: Training) -> Limits:
    """The sizes of rows and batches that a recipe asks for."""
    return Limits(training.max_length, training.pack, training.eval_batch_size)


def attach(recipe: Recipe, model: Loaded, seen: Look) -> Adapter:
    """The recipe's adapter on its model; modules that start untrained are trained unless the recipe
    names others. Of what was `seen`, what other methods need is kept."""
    train = model.fresh if recipe.train_modules is None else recipe.train_modules
    scores = seen.scores(recipe.structure)
    adapter = adapt(model.model, recipe.structure, recipe.targets, train, scores=scores)
    seen.keep(recipe.needs(but="structure"))
    if not adapter.parameters():
        raise InputError("nothing to train: targets and train are both empty")
    return adapter


def choose_device(name: str | None) -> torch.device:
    """The device that a recipe names, or a GPU where there is one. Raises InputError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"training.device={name!r} is not here ({reason}); try cpu") from error


@contextmanager
def surroundings(recipe: Recipe) -> Iterator[None]:
    """Threads as the recipe says and denormals flushed; threads and random state of before come
    back at the end."""
    threads, random = torch.get_num_threads(), random_state()
    torch.set_num_threads(recipe.training.threads or threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        set_random_state(random)
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


# --- small parts ---------------------------------------------------------------------------------
def lineage(recipe: Recipe, metrics: dict[str, float], task: Task[Any, Any]) -> Lineage:
    """What adapter.json says of the run that made it."""
    seeds = {"training": recipe.training.seed, "data": recipe.data.seed}
    return lineage_of(recipe.structure, recipe.dump(), metrics, seeds, task=task.record())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_same(job: Job, state: dict[str, Any], folder: Path) -> None:
    """Raise InputError where rows or choices are not those that the checkpoint's run began with."""
    anew = f"delete {str(folder / CHECKPOINT)!r} to start anew"
    if state["data"] != job.train.key:
        raise InputError(
            f"the rows to train on changed since the run in {str(folder)!r} began: bring them "
            f"back, or {anew}"
        )
    if state["plan"] != job.plan_key:
        raise InputError(
            f"{job.recipe.structure.kind} chooses other parameters than when the run in "
            f"{str(folder)!r} began: try training.threads={state['threads']}, as it had, or {anew}"
        )


def _resumed(loop: Loop, state: dict[str, Any]) -> str:
    text = f"resumed after step {loop.step} of {loop.steps}"
    threads = torch.get_num_threads()
    if threads != state["threads"]:
        text += (
            f"; it began with {state['threads']} threads and goes on with {threads}: "
            "the result will not be the same bit for bit"
        )
    return text


def _result(
    job: Job, loop: Loop, before: dict[str, float], after: dict[str, float], folder: Path
) -> Result:
    last = loop.losses[-loop.steps_per_epoch :]
    return Result(
        output=job.recipe.output,
        before=before,
        after=after,
        sites=len(job.adapter.attached.plan.sites),
        num_update_parameters=job.adapter.num_update_parameters,
        num_module_parameters=job.adapter.num_module_parameters,
        adapter_bytes=sum((folder / name).stat().st_size for name in ADAPTER),
        train_rows=len(job.train),
        test_rows=len(job.test),
        steps=loop.steps,
        loss=sum(last) / len(last),
        seconds=round(loop.seconds, 3),
        peak_memory=peak_memory(),
        threads=torch.get_num_threads(),
        task=job.task.record(),
    )
