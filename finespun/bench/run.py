"""A bench from file to table: members fitted, learning rates searched, all
seeds trained, all written."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import finespun
from finespun.bench.budget import fit, total
from finespun.bench.picture import draw
from finespun.bench.search import Choice, Score, choose_lr
from finespun.bench.spec import BenchSpec, Member, describe, rounded
from finespun.bench.summary import Row, Summary
from finespun.bench.tables import csv_text, markdown
from finespun.bench.trials import Outcome, Results, Trial
from finespun.bench.workbench import Workbench
from finespun.contract import Structure, Unmeasured
from finespun.errors import InputError, nearest
from finespun.recipes.recipe import Recipe
from finespun.storage.atomic import write_file
from finespun.tasks.task import Task

TABLE, SHEET, PICTURE = "table.md", "table.csv", "picture"
Teller = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """A member at one size; `recipe` has everything but its learning rate and its seed."""

    name: str
    recipe: Recipe
    lrs: tuple[float, ...]
    budget: int | None
    num_parameters: int = 0
    lr: float | None = None
    lr_of: str | None = None
    lr_power: float = 0.0

    def trial(self, lr: float, seed: int, epochs: int, held: float | None = None) -> Trial:
        """The trial at one learning rate and seed; `held`: measured on that share of the rows."""
        training = self.recipe.training.model_copy(
            update={"lr": lr, "seed": seed, "epochs": epochs}
        )
        structure = dataclasses.replace(self.recipe.structure, seed=seed)
        recipe = self.recipe.model_copy(update={"training": training, "structure": structure})
        return Trial(self.name, recipe, None if held is None else (held, seed))


class Bench:
    """Carries out a spec: what is in `results.jsonl` of its folder already is not run again.

    `report` receives one line for every trial.
    """

    def __init__(self, spec: BenchSpec, command: str, report: Teller = lambda line: None) -> None:
        self.spec, self.command, self.report = spec, command, report
        self.folder = Path(spec.output).expanduser()
        self.workbench = Workbench()
        self.results = Results(self.folder)

    def run(self) -> Summary:
        """Search, train and sum up; then table.md, table.csv and the picture are in the folder.

        Raises InputError and FileError before the first trial where that can be known.
        """
        summary = self.measure()
        write_file(self.folder / TABLE, markdown(summary))
        write_file(self.folder / SHEET, csv_text(summary))
        draw(summary, self.folder / PICTURE)
        return summary

    def measure(self) -> Summary:
        """All trials that are still missing, and what they say."""
        metric, contenders = self.metric, self.contenders()
        choices = self.choices(contenders)
        epochs = self.spec.recipe.training.epochs
        found: dict[str, list[Outcome]] = {one.name: [] for one in contenders}
        for seed in self.spec.seeds:
            for one in contenders:
                if (lr := choices[one.name].lr) is not None:
                    found[one.name].append(self.outcome(one.trial(lr, seed, epochs)))
        rows = [self.row(one, choices[one.name], found[one.name]) for one in contenders]
        test = self.workbench.data(self.spec.recipe).test
        return Summary(tuple(rows), metric, self.spec.seeds, len(test), self.command)

    @cached_property
    def task(self) -> Task[Any, Any]:
        """What all members learn."""
        return self.workbench.task(self.spec.recipe)

    @cached_property
    def metric(self) -> str:
        """What decides: the spec's metric, else the task's best.

        Raises InputError for one that the task does not have, or that falls where a fit is good.
        """
        if self.spec.metric not in (None, *self.task.metrics):
            raise InputError(
                f"metric {self.spec.metric!r} is none for the task {self.task.kind!r}; "
                f"{nearest(str(self.spec.metric), self.task.metrics)}"
            )
        return self.spec.metric or self.task.best

    def contenders(self) -> list[Contender]:
        """Every member at every size. Raises InputError where a size or a name cannot be had."""
        found: list[Contender] = []
        for member in self.spec.members:
            targets = self.spec.recipe.targets if member.targets is None else member.targets
            recipe = self.spec.recipe.model_copy(update={"targets": targets, **member.values})
            for budget in member.num_parameters or (None,):
                sized = recipe.model_copy(update={"structure": self.fitted(member, recipe, budget)})
                name = self.name(member, sized.structure, budget)
                sites = self.workbench.sites(sized, sized.structure)
                if len(sized.values) > 1:
                    self.workbench.check(sized)
                found.append(
                    Contender(
                        name,
                        sized,
                        member.lrs or self.spec.lrs,
                        budget,
                        total(sized.structure, sites) if sites else 0,
                        member.lr,
                        member.lr_of,
                        member.lr_power,
                    )
                )
        names = [one.name for one in found]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two members are called {name!r}; give one of them a name")
        must_carry(found)
        return found

    def choices(self, contenders: Sequence[Contender]) -> dict[str, Choice]:
        """Everyone's learning rate: searched first, then carried over by r·(parameters / own)^p."""
        found = {one.name: self.search(one) for one in contenders if one.lr_of is None}
        counts = {one.name: one.num_parameters for one in contenders}
        for one in contenders:
            if one.lr_of is not None:
                source, p = found[one.lr_of], one.lr_power
                factor = (counts[one.lr_of] / one.num_parameters) ** p if p else 1.0
                lr = source.lr and rounded(source.lr * factor)
                found[one.name] = Choice(lr, source.lrs, source.at_edge)
        return found

    def fitted(self, member: Member, recipe: Recipe, budget: int | None) -> Structure:
        """The member's structure at a budget; as it is without one."""
        sites = self.workbench.sites(recipe, member.structure)
        if budget is None:
            member.structure.plan(sites, Unmeasured())
            return member.structure
        return fit(member.structure, member.given, sites, budget)

    def name(self, member: Member, structure: Structure, budget: int | None) -> str:
        """The member's name, its size added where it has several."""
        if member.name is not None:
            return member.name if len(member.num_parameters) < 2 else f"{member.name} {budget:,}"
        if member.targets == ():
            return "head only"
        name = describe(structure)
        if member.targets is not None:
            only = member.targets if isinstance(member.targets, str) else ", ".join(member.targets)
            name += f" on {only}"
        return name

    def search(self, one: Contender) -> Choice:
        """The contender's learning rate, by the spec's search, or as it is given."""
        if one.lr is not None:
            return Choice(one.lr, (one.lr,), False)
        search = self.spec.search

        def measure(lr: float, epochs: int) -> Score | None:
            outcome = self.outcome(one.trial(lr, search.seed, epochs, search.rows))
            score = outcome.score(self.metric)
            return None if score is None else (score, -outcome.metrics[self.task.falls])

        return choose_lr(one.lrs, self.spec.rungs, search.keep, self.spec.extend, measure)

    def outcome(self, trial: Trial) -> Outcome:
        """What the trial came to: from the results, or by running it now."""
        known = self.results.get(trial)
        if known is None:
            outcome = self.workbench.run(trial)
            about = {"versions": {"finespun": finespun.__version__, "torch": torch.__version__}}
            self.results.add(trial, outcome, about)
        else:
            outcome = known
        self.report(self.line(trial, outcome, known is not None))
        return outcome

    def line(self, trial: Trial, outcome: Outcome, known: bool) -> str:
        """One line about a trial."""
        training = trial.recipe.training
        score = outcome.score(self.metric)
        what = "diverged" if score is None else f"{self.metric} {score:.4f}"
        stage = "search" if trial.held else f"seed {training.seed}"
        when = "known already" if known else f"{outcome.seconds:.1f} s"
        plural = "" if training.epochs == 1 else "s"
        return (
            f"{trial.member}, {stage}, learning rate {trial.recipe.lr:g}, "
            f"{training.epochs} epoch{plural}: {what} ({when})"
        )

    def row(self, one: Contender, choice: Choice, outcomes: list[Outcome]) -> Row:
        """The contender's row, from one outcome a seed; none if every learning rate diverged."""

        def mean(name: str) -> float:
            values = [getattr(outcome, name) for outcome in outcomes]
            return round(sum(values) / len(values), 3) if values else 0.0

        return Row(
            name=one.name,
            structure=one.recipe.structure,
            targets=one.recipe.targets,
            budget=one.budget,
            num_update_parameters=outcomes[0].num_update_parameters if outcomes else 0,
            num_module_parameters=outcomes[0].num_module_parameters if outcomes else 0,
            bytes=outcomes[0].bytes if outcomes else 0,
            lr=choice.lr,
            lrs=choice.lrs,
            at_edge=choice.at_edge,
            scores=tuple(outcome.score(self.metric) for outcome in outcomes)
            or (None,) * len(self.spec.seeds),
            seconds=mean("seconds"),
            cpu_seconds=mean("cpu_seconds"),
            lr_of=one.lr_of,
        )


def must_carry(contenders: Sequence[Contender]) -> None:
    """Raise InputError where a `lr_of` names no one, or a `lr_power` has no parameters to go by:
    those of a head alone are none, those beside an allocation are known after the run only."""
    sources = {one.name: one for one in contenders if one.lr_of is None}
    for one in contenders:
        if one.lr_of is None:
            continue
        if one.lr_of not in sources:
            raise InputError(
                f"{one.name!r} takes the learning rate of {one.lr_of!r}, which no member "
                f"with an lr or a search is called; {nearest(one.lr_of, sources)}"
            )
        for other in (one, sources[one.lr_of]) if one.lr_power else ():
            why = "trains no parameters but the head's" if not other.num_parameters else ""
            if other.recipe.allocation is not None:
                why = "has an allocation, so that its parameters are known after the run only"
            if why:
                raise InputError(
                    f"lr_power = {one.lr_power:g} of {one.name!r} scales by parameters, but "
                    f"{other.name!r} {why}; leave lr_power out, or give {one.name!r} an lr"
                )
