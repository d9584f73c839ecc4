"""An adapter in training: the order of hooks, gradients before training, training in place."""

from finespun.driver.activations import mean_activations
from finespun.driver.driver import Driver
from finespun.driver.gradients import estimate_gradients, start_from_gradients
from finespun.driver.groups import adamw, param_groups, set_lr
from finespun.driver.in_place import in_place
from finespun.driver.moments import Moments
from finespun.driver.setup import Prepared, check, prepare

__all__ = [
    "Driver",
    "Moments",
    "Prepared",
    "adamw",
    "check",
    "estimate_gradients",
    "in_place",
    "mean_activations",
    "param_groups",
    "prepare",
    "set_lr",
    "start_from_gradients",
]
