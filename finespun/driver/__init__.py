"""The moments of a training step, clipping, gradients before it, and training in place."""

from finespun.contract.training import Moments
from finespun.driver.activations import mean_activations
from finespun.driver.driver import Driver
from finespun.driver.gradients import estimate_gradients, start_from_gradients
from finespun.driver.in_place import in_place

__all__ = [
    "Driver",
    "Moments",
    "estimate_gradients",
    "in_place",
    "mean_activations",
    "start_from_gradients",
]
