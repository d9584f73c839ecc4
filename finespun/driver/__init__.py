"""The moments of a training step, clipping, and gradients of the base weights before it."""

from finespun.driver.activations import mean_activations
from finespun.driver.driver import Driver, Moments
from finespun.driver.gradients import estimate_gradients

__all__ = ["Driver", "Moments", "estimate_gradients", "mean_activations"]
