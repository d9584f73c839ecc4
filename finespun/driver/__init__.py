"""The moments of a training step, clipping, and what may happen there."""

from finespun.driver.driver import Driver, Moments

__all__ = ["Driver", "Moments"]
