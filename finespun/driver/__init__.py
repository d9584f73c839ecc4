"""An adapter in training: the order of hooks, gradients before training, training in place."""

from finespun.driver.driver import Driver
from finespun.driver.groups import adamw, param_groups, set_lr
from finespun.driver.in_place import in_place
from finespun.driver.look import (
    Look,
    estimate_gradients,
    mean_activations,
    measure,
    start_from_gradients,
)
from finespun.driver.moments import Moments
from finespun.driver.setup import Prepared, check, prepare
from finespun.driver.starting import begin, start

__all__ = [
    "Driver",
    "Look",
    "Moments",
    "Prepared",
    "adamw",
    "begin",
    "check",
    "estimate_gradients",
    "in_place",
    "mean_activations",
    "measure",
    "param_groups",
    "prepare",
    "set_lr",
    "start",
    "start_from_gradients",
]
