"""What a method may do and ask during training: protocols that drivers and hosts implement."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finespun.contract.delta import Bank, Delta
from finespun.contract.groups import Group
from finespun.contract.need import Need as Need
from finespun.contract.structure import Plan, Structure
from finespun.linalg import LowRank

if TYPE_CHECKING:
    from finespun.contract.mixing import Mixing


class Moment(NamedTuple):
    """When a forward pass runs: finished steps, and the micro-batch of the step under way."""

    step: int
    micro: int


class MicroBatch(NamedTuple):
    """What the model was given in one micro-batch, and its share of the step's loss."""

    batch: Any
    share: float


class ParamGroup(NamedTuple):
    """A wish for some parameters: lr = lr_factor · the run's lr (0: they are frozen), and whether
    they decay."""

    parameters: Sequence[nn.Parameter]
    lr_factor: float = 1.0
    decay: bool = True


Overlay = Callable[[Tensor, Moment], Tensor]
Member = Callable[[Tensor], Tensor]
Mixer = Callable[[Tensor, Tensor, Mapping[str, Member]], Tensor]
Heads = Literal["own", "fresh"] | Mapping[str, Tensor]


class AdapterView(Protocol):
    """An adapter in a model, as a method sees it. Plans change; shapes and identity do not."""

    @property
    def name(self) -> str: ...
    @property
    def structure(self) -> Structure: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def deltas(self) -> Mapping[str, Delta]: ...
    @property
    def bank(self) -> Bank | None: ...

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, modules and bank included, each once."""

    def mix(self, site: str, mixing: "Mixing") -> None:
        """Let other adapters at a site be mixed by this one, at inference too: the mixer is trained
        and saved with it. Raises StateError for a second one."""

    def replan(self, plan: Plan) -> None:
        """Make other choices for the same sites; hosts read them at once. Raises PlanError for
        other sites."""


class Measured(Protocol):
    """What was measured of the base for the needs that were declared; InputError for others."""

    def gradient(self, site: str) -> Tensor:
        """∂L/∂W0 (out, in)."""

    def activation(self, site: str) -> Tensor:
        """Mean |h| of what the site reads or writes, (features,)."""

    def covariance(self, site: str) -> Tensor:
        """E[x xᵀ] (in, in) of what the site reads, not centred."""

    def mean(self, site: str) -> Tensor:
        """E[x] (in,) of what the site reads."""

    def loss(self) -> float:
        """The mean loss of the rows that were looked at, with the adapter as it is now."""

    def update(self, site: str) -> LowRank:
        """ΔW of another adapter, strength included."""

    def weight(self, site: str) -> Tensor:
        """W0 (out, in) as it was before it was quantised."""


class Setup(Protocol):
    """What is known before the optimiser exists: gates, starts and masks are made with it."""

    @property
    def adapter(self) -> AdapterView: ...
    @property
    def measured(self) -> Measured: ...
    @property
    def held_out(self) -> Iterable[Any]: ...
    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Slots(Protocol):
    """What hooks may hang into layers for a while, at (site, adapter) and under their own name.

    Whatever is still there is taken away when training ends, by an error too. InputError for a
    site that the adapter does not have, StateError for what was not declared in `needs`.
    """

    def gain(self, site: str, value: Tensor | None) -> None:
        """Scale what reaches the trained parameters, a scalar or (out,); outputs stay. Gains of
        several hooks multiply; None takes it away."""

    def overlay(self, site: str, function: Overlay | None) -> None:
        """Add function(x, moment), x (..., in) -> (..., out), to the output while training;
        overlays of several hooks add."""

    def mixer(self, site: str, function: Mixer | None) -> None:
        """Let function(x, base output, members) be the output, where members are the changes
        x -> ΔW x of the active adapters by name, each for any subset of rows. StateError for a
        second mixer at a site."""

    def perturb(self, changes: Mapping[nn.Parameter, Tensor]) -> None:
        """Add to parameters until the step; what stood there comes back, bit for bit, before a
        step, an evaluation or a save."""

    def hold_still(self, site: str, group: Group) -> None:
        """For this step a group's gradient is zero, and its values and moments stay."""


class StepContext(Protocol):
    """Handed to every hook; `step` counts finished steps and is the same in all hooks of a step."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def adapter(self) -> AdapterView: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def step(self) -> int: ...
    @property
    def micro(self) -> int: ...
    @property
    def slots(self) -> Slots: ...

    def generator(self, *purpose: str | int) -> torch.Generator:
        """A CPU generator fixed by (seed, purpose)."""

    def lr(self, parameter: nn.Parameter) -> float:
        """The learning rate of a parameter in this step. Raises InputError for one that the
        optimiser does not train."""

    def call(self, batch: Any) -> Any:
        """The model's outputs for a batch as hooks are given it; no hook is called."""

    def teacher(self, batch: Any, heads: Heads = "own") -> Any:
        """The outputs of the model without its deltas, in eval mode and without gradients, with
        its trained modules ("own"), those of the base ("fresh"), or a snapshot of them."""

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the trained modules' tensors, for `teacher`."""

    def replay(self) -> Iterator[MicroBatch]:
        """The step's micro-batches once more; each under the random state that it ran with."""


class TrainingHooks:
    """One value of an axis during one run; every hook does nothing until overridden.

    prepare → begin → per step: before_step, before_forward and extra_loss for each micro-batch,
    gradients_ready, after_step → end. What follows from (parameters, step, seed) is derived in
    `before_step`; the rest travels in `state_dict`: so a resumed run is exact. `needs` says which
    slots and services are used.
    """

    needs: frozenset[Need] = frozenset()

    def prepare(self, setup: Setup) -> None:
        """Before the optimiser exists. Raises InputError where the adapter cannot take it; then
        nothing is changed yet."""

    def parameters(self) -> list[ParamGroup]:
        """Parameters of its own, which join the optimiser and the state, and wishes for those of
        the adapter; asked once, after `prepare`."""
        return []

    def begin(self, context: StepContext) -> None:
        """The optimiser exists, nothing has run."""

    def before_step(self, context: StepContext) -> None:
        """The first training pass after a step, a start or a resume is about to run."""

    def before_forward(self, context: StepContext) -> None:
        """A training pass of a micro-batch is about to run."""

    def extra_loss(self, context: StepContext, batch: Any, outputs: Any) -> Tensor | None:
        """A 0-d term, a mean over the batch's rows, to add to the loss of one forward pass."""
        return None

    def gradients_ready(self, context: StepContext) -> None:
        """All gradients of this step are there, unscaled, not yet clipped."""

    def after_step(self, context: StepContext) -> None:
        """The optimiser has moved the parameters; `context.step` is still that of this step."""

    def news(self, step: int) -> list[str]:
        """What happened in the step after which `step` are finished, in words, for the log."""
        return []

    def end(self, context: StepContext) -> None:
        """The last step is done; not called after an error."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values and tensors to resume from."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`, after `begin`."""
