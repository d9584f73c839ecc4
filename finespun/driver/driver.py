"""The driver: calls the hooks of all axes in the order of a training step, on torch's own hooks.

prepare → begin → per step: before_step, before_forward and extra_loss for each micro-batch →
perturbations taken back → unscale → gradients_ready → dead and held gradients to zero → clip →
torch's step → dead and held values and moments → after_step → … → end → close. A bare loop, Trainer
and TRL are the same to it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finespun.contract import AxisValue, Moment, Need, TrainingHooks
from finespun.driver.context import Context
from finespun.driver.first_step import FirstStep
from finespun.driver.micro import Micro, share_of
from finespun.driver.moments import Moments, renewed
from finespun.driver.perturbing import Perturbation
from finespun.driver.setup import Prepared, prepare
from finespun.driver.slots import Desk, OwnSlots
from finespun.driver.stepping import Nesting, unscale
from finespun.driver.stillness import Stillness
from finespun.driver.watch import Watch
from finespun.errors import InputError, TrainingError
from finespun.hosts import View

Hooks = Prepared | Sequence[AxisValue | TrainingHooks | Moments]


class Driver:
    """Watches one optimiser that trains adapter `name` of `model`, and calls `hooks` in order.

    Clips the gradients of all that it trains to `max_grad_norm` (0: not at all), keeps dead
    parameters dead and held ones still, and checks the first real step: every trained site must
    have run, or TrainingError names those that did not; a site that ran without moving is warned
    of. `hooks` are values of the axes, hooks, or what `prepare` made of them; `steps` and `seed`
    are for hooks that were not prepared; with `own_loss` the loop adds `loss` to a loss of its own,
    and what the model returns is left alone. As a context manager it closes itself.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        optimizer: Optimizer,
        max_grad_norm: float = 1.0,
        hooks: Hooks = (),
        *,
        steps: int | None = None,
        seed: int = 0,
        own_loss: bool = False,
        moments: Sequence[Moments] = (),
    ) -> None:
        if not (math.isfinite(max_grad_norm) and max_grad_norm >= 0):
            raise InputError(f"max_grad_norm={max_grad_norm} must be 0 (off) or positive; try 1.0")
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm
        self.view = View(model, name)
        self.step, self.grad_norm = 0, 0.0
        self.first = FirstStep(self.view)
        if not isinstance(hooks, Prepared):
            hooks = prepare(model, name, renewed([*hooks, *moments]), steps, seed)
        self.prepared, self.hooks = hooks, hooks.hooks
        self.micro = Micro(keeps=any(Need.REPLAY in h.needs for h in self.hooks))
        self.still = Stillness(self.view, optimizer)
        self.perturbation = Perturbation()
        self.desk = Desk(self.view, self.perturbation, self.still, self._moment)
        self.contexts = self._contexts(hooks.seed)
        self.losses = [
            (h, c) for h, c in zip(self.hooks, self.contexts) if _overrides(h, "extra_loss")
        ]
        self.own_loss, self.added, self.open, self.ended = own_loss, False, True, False
        self._inside, self._skipped, self._passed = False, False, False
        self._nesting = Nesting()
        self._check_trained()
        self._handles = self._watch()
        self._call("begin")

    # --- for loops ------------------------------------------------------------------------------
    @property
    def checked(self) -> bool:
        """Whether the first real step was checked."""
        return self.first.done

    def parameters(self) -> list[nn.Parameter]:
        """All that the optimiser trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def micro_batch(self, first: bool, share: float | None = None) -> None:
        """A loop says that a micro-batch begins, the first of a step or another, which is `share`
        of the step's loss. Without it each training pass of the model is one."""
        if first:
            self._forget()
        self.micro.announce(share)

    def loss(self, batch: Any, outputs: Any, num_items_in_batch: Any = None) -> Tensor | float:
        """The sum of all extra losses of one forward pass, for loops with a loss of their own.

        Weight it by the micro-batch's share of the step, as the loss itself; where that is a sum
        divided by `num_items_in_batch` (Trainer's), pass it and the share is that of the batch's
        labels. Raises TrainingError where it then has none.
        """
        with self.quiet():
            found = [h.extra_loss(c, batch, outputs) for h, c in self.losses]
        terms = [term for term in found if term is not None]
        total = torch.stack(terms).sum() if terms else torch.zeros(())
        if total.requires_grad:
            total.register_hook(self._reached)
        else:
            self.added = True
        if not terms:
            return 0.0
        if num_items_in_batch is None:
            return total
        return total * share_of(self.model, {**batch, "num_items_in_batch": num_items_in_batch})

    def news(self) -> list[str]:
        """What happened in the last step, in words."""
        return [text for hooks in self.hooks for text in hooks.news(self.step)]

    def end(self) -> None:
        """The last step is done: call every hook's `end`, once."""
        if not self.ended:
            self.ended = True
            self.perturbation.undo()
            self._call("end")

    def close(self, finished: bool = True) -> None:
        """Call `end` if training is finished, then take away every hook, slot and perturbation,
        whatever happens."""
        if not self.open:
            return
        self.open = False
        try:
            if finished:
                self.end()
        finally:
            self.desk.close([c.slots.owner for c in self.contexts])
            for handle in self._handles:
                handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(finished=kind is None)

    def state_dict(self) -> dict[str, Any]:
        """Step count, the state of all hooks, and the parameters that they own."""
        return {
            "step": self.step,
            "hooks": [h.state_dict() for h in self.hooks],
            "parameters": [p.detach().clone() for p in self.prepared.owned],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. Raises InputError when the axes are not those that were saved."""
        saved, owned = state["hooks"], self.prepared.owned
        if len(saved) != len(self.hooks):
            raise InputError(f"the checkpoint holds {len(saved)} axes, this run {len(self.hooks)}")
        shapes = [tuple(p.shape) for p in owned], [tuple(p.shape) for p in state["parameters"]]
        if shapes[0] != shapes[1]:
            raise InputError(f"the hooks own parameters {shapes[0]}, the checkpoint {shapes[1]}")
        self.step = state["step"]
        self.first.done = self.step > 0
        self.micro.restart()
        with torch.no_grad():
            for parameter, value in zip(owned, state["parameters"]):
                parameter.copy_(value)
        for hooks, own in zip(self.hooks, saved):
            hooks.load_state_dict(own)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside the block the model's passes call no hooks."""
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    # --- passes ---------------------------------------------------------------------------------
    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inside:
            return
        if not (model.training and torch.is_grad_enabled()):
            self.perturbation.aside()
            return
        if self._passed and all(p.grad is None for p in self.parameters()):
            self._forget()  # gradients that came are gone, and there was no step: it was skipped
        self.perturbation.resume()
        if self.micro.begin():
            if self.micro.begun == 1:
                self._call("before_step")
            self._call("before_forward")
        self.micro.keep(model, args, kwargs)

    def _leave(self, model: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
        training = model.training and torch.is_grad_enabled()
        if self._inside or not training or getattr(outputs, "loss", None) is None:
            return outputs
        extra = self.loss(kwargs or args, outputs, kwargs.get("num_items_in_batch"))
        outputs["loss" if isinstance(outputs, dict) else 0] = outputs.loss + extra
        return outputs

    def _reached(self, gradient: Tensor) -> None:
        self.added = True

    def _arrived(self, parameter: Tensor) -> None:
        self._passed = True

    # --- steps ----------------------------------------------------------------------------------
    def _pre_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._nesting.enter():
            return
        try:
            self.perturbation.undo()
            self._skipped = unscale(optimizer, self.parameters())
            if not self._skipped:
                self._check_losses()
                self._call("gradients_ready")
                self.still.before()
                self._clip()
                self.first.begins(optimizer)
        except BaseException:
            self._nesting.reset()
            raise

    def _post_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._nesting.leave():
            return
        if not self._skipped:
            self.still.after()
            self.first.ends()
            self._call("after_step")
            self.step += 1
        self._forget()

    def _forget(self) -> None:
        """The next pass is the first of a step."""
        self.perturbation.undo()
        self.still.held.clear()
        self.micro.restart()
        self._passed = False

    def _clip(self) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not gradients:
            return
        total = nn.utils.get_total_norm(gradients)
        self.grad_norm = float(total)
        if self.max_grad_norm and self.grad_norm > self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters(), self.max_grad_norm, total)

    def _check_losses(self) -> None:
        if self.losses and not self.added:
            names = ", ".join(type(h).__name__ for h, _ in self.losses)
            raise TrainingError(
                f"the extra loss of {names} was never added: backward() did not come from the "
                "model's own loss; pass own_loss=True and add driver.loss(batch, outputs) to yours"
            )

    # --- small parts ----------------------------------------------------------------------------
    def _moment(self) -> Moment:
        return Moment(self.step, self.micro.index)

    def _call(self, name: str) -> None:
        with self.quiet():
            for hooks, context in zip(self.hooks, self.contexts):
                getattr(hooks, name)(context)

    def _contexts(self, seed: int) -> list[Context]:
        found: list[Context] = []
        kinds = [type(h).__name__ for h in self.hooks]
        for i, hooks in enumerate(self.hooks):
            again = kinds[:i].count(kinds[i])
            owner = f"{kinds[i]} {again + 1}" if again else kinds[i]
            found.append(Context(self, OwnSlots(self.desk, owner, hooks.needs), seed))
        return found

    def _check_trained(self) -> None:
        stepper, inner = self.prepared.stepper, getattr(self.optimizer, "optimizer", self.optimizer)
        if stepper is not None and inner is not self.prepared.made:
            raise InputError(
                f"{stepper.kind} is an optimiser of its own: call prepare(model, name, hooks), "
                "make the optimiser by its optimizer(lr), and pass what prepare returned as hooks="
            )
        inside = {id(p) for p in self.parameters()}
        own = [p for p in self.view.parameters() if p.requires_grad]
        if own and not any(id(p) in inside for p in own):
            raise InputError(
                f"the optimiser trains none of the {len(own)} parameter tensors of "
                f"{self.view.name!r}: was it made before the adapter? Make it of "
                "adapter.parameters()"
            )
        missing = [p for p in self.prepared.owned if p.requires_grad and id(p) not in inside]
        if missing:
            raise InputError(
                f"the hooks own {len(missing)} parameters that the optimiser does not train: call "
                "prepare(model, name, hooks) first, make the optimiser of its groups(lr), and pass "
                "what it returned as hooks="
            )

    def _watch(self) -> list[Any]:
        handles = [
            self.optimizer.register_step_pre_hook(self._pre_step),
            self.optimizer.register_step_post_hook(self._post_step),
        ]
        if not self.hooks:
            return handles
        enter, leave = Watch(self._enter), Watch(self._leave)
        handles.append(self.model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        if self.losses and not self.own_loss:
            handles.append(self.model.register_forward_hook(leave, with_kwargs=True))
        handles += [
            p.register_post_accumulate_grad_hook(self._arrived)
            for p in self.parameters()
            if p.requires_grad
        ]
        if any(Need.PERTURBATION in h.needs for h in self.hooks):
            aside = Watch(lambda *_: self.perturbation.aside())
            entry = self.view.entry
            held = [*entry.deltas.values(), *entry.copies.values(), entry.bank]
            handles += [m.register_state_dict_pre_hook(aside) for m in held if m is not None]
        return handles


def _overrides(hooks: TrainingHooks, name: str) -> bool:
    return getattr(type(hooks), name) is not getattr(TrainingHooks, name)
